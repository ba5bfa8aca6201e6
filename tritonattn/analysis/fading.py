"""The number of keys at which attention fades, since its logits do not grow.

A row gives its largest key the mass p among n keys. As if all the others stood g below it,

    p = 1 / (1 + (n - 1) e^-g)          so          g = ln(n - 1) + ln(p / (1 - p))

Keys added to a context raise n and leave g where it is, as long as the new keys are like the old ones and no factor
grows with n. So the odds p / (1 - p) fall like 1 / n, and p is 1/2 at n = 1 + e^g. Training can raise g, but not
beyond a bound: the logits of normalised q and k (QK-norm, cosine) lie within +-|factor| ||q|| ||k||, those of a softcap
c within +-c, and g is at most twice that. A factor that grows like ln n raises g as ln n grows.

Sources: Velickovic et al. 2024, arXiv:2410.01104 (bounded logits disperse); Nakanishi 2025, arXiv:2501.19399
(attention fades as n grows). The formula is the softmax of one logit and n - 1 equal ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.norms import key_norms_of
from ..core.visibility import Visibility
from .row_statistics import RowStatistics

_SMALLEST = 2.0**-53  # of 1 - p, in fp64


def gaps_of(rows: RowStatistics, softcap: float | Tensor | None) -> Tensor:
    """g of every row, fp64 [B, Hq, Sq], at most 2 softcap; 0 where n < 2."""
    others = (1 - rows.max_probability).clamp(min=_SMALLEST)
    several = rows.key_count > 1
    count = torch.where(several, rows.key_count - 1, 1)
    gap = torch.where(several, count.log() + (rows.max_probability / others).log(), 0)
    return gap if softcap is None else gap.clamp(max=2 * softcap)


def mass(gap: float, n: int) -> float:
    """p of the largest of n keys, 1 / (1 + (n - 1) e^-gap); NaN of a NaN gap."""
    return float((torch.tensor(gap, dtype=torch.float64) - math.log(max(n - 1, 1))).sigmoid())


def half_at(gap: float | Tensor) -> Tensor:
    """n at which p is 1/2, 1 + e^gap, of the gap's shape in fp64; infinite where that passes it."""
    return 1 + torch.as_tensor(gap, dtype=torch.float64).exp()


def logit_bound(
    q: Tensor, k: Tensor, key_scale: Tensor | None, factor: Tensor, seen: Visibility, softcap: float | Tensor | None
) -> Tensor:
    """The largest logit of every row for keys of the norms of those that some row attends to, fp64 [B, Hq, Sq].

    key_scale [B, Hkv, Sk] or None; factor [B, Hq, Sq], of the rows
    """
    norms = key_norms_of(k).double()  # [B, Hkv, Sk]
    if key_scale is not None:
        norms = norms * key_scale.double().abs()
    visible = seen.seen_keys().expand(seen.keys)
    largest = torch.nn.functional.pad(torch.where(visible, norms, 0), (0, 1)).amax(-1)  # [B, Hkv]
    largest = largest.repeat_interleave(seen.q_heads // max(seen.kv_heads, 1), 1)[..., None]
    bound = key_norms_of(q).double() * factor.abs() * largest
    return bound if softcap is None else bound.clamp(max=softcap)
