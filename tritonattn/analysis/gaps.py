"""The power of ln n that the gaps between a row's largest logits ask for.

Let x_1 >= x_2 >= ... be q . k (times factors of keys) over the n visible keys of a row, and c the number of keys within
a gap g_c = x_1 - x_(c+1) of the largest, which compete with it. A factor b gives them the weight exp(-b g_c) each. With

    b* = max_c ln(c) / g_c

they weigh c^(-b / b*) at most. So above b* the largest keys take all, however large n is; below it the c competitors of
the maximum outweigh them, by c^(1 - b / b*) at least. A factor that keeps attention between the two grows with n as b*
does: (ln n)^p.

    p = 0     exponential tails: the gaps do not depend on n
    p = 1/2   independent Gaussian logits: the largest is about sqrt(2 ln n), and gaps are 1 / sqrt(2 ln n)
    p = 1     a few keys stand out by a margin that does not depend on n, over all others
    p = 2     logits that crowd towards a bound, P(x > bound - u) = exp(-1 / u)

Keys close to a bound with a density there, as cosines in few dimensions, ask for a power of n itself.

Sources: arXiv:2605.12697 (the scale comes from counting the competitors within each gap) and arXiv:2510.05554 (p = 1).
Only their abstracts were at hand: b* and its proof above are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..core.visibility import Visibility

# Each with the range of its fits: half way between those of samples of the four laws, about 0.1, 0.6, 1.05 and 1.95.
POWERS = {0.0: (-0.35, 0.35), 0.5: (0.35, 0.85), 1.0: (0.85, 1.5), 2.0: (1.5, 2.75)}

_KEYS = 16  # rows of fewer tell nothing about tails
_SPREAD = 8  # the largest n over the smallest that a fit needs
_COMPETITORS = 4  # the nearest come close by chance
_BINS = 8  # of ln n
_GROUPS = 4  # of rows, apart in n or sequence, that a fit needs
_ROWS = 1024  # at most, of a head of a sequence
_PAIRS = 1 << 20  # of these rows and keys, at most, where that leaves a bin 8 rows


def count_power(
    q: Tensor, k: Tensor, key_scale: Tensor | None, sign: Tensor, seen: Visibility
) -> tuple[Tensor, Tensor]:
    """Fit p of each query head, and its standard error: fp64 [Hq], NaN where rows are too few or n varies too little.

    ln b* of up to 1,024 rows of each head and sequence, from 8 bins of ln n, is fitted by a line in ln ln n. Where the
    maximum over c is that of the nearest competitors, finite n makes b* grow faster than its law: the line is then in
    ln ln (n / 3), on which samples of known laws, 16 to 8,192 keys, are within 0.2 of their p. The error takes the rows
    of a bin of a sequence, which share keys, for one observation.

    key_scale [B, Hkv, Sk] or None; sign [B, Hq, Sq], of the rows' factors
    """
    counts = seen.counts().expand(seen.rows)
    group = seen.q_heads // max(seen.kv_heads, 1)
    fits = []
    for head in range(seen.q_heads):
        found = []
        for entry in range(seen.batch):
            key = k[entry, head // group].double()  # [Sk, D]
            if key_scale is not None:
                key = key * key_scale[entry, head // group, :, None].double()
            for rows in _sampled(counts[entry, head], seen.k_len):
                x = (q[entry, head, rows].double() * sign[entry, head, rows, None]) @ key.mT
                x = x.masked_fill(~_visible(seen, entry, head, rows), -torch.inf)
                found.append(_critical(x, counts[entry, head, rows]))
        fits.append(_fit(found))
    power, error = q.new_tensor(fits, dtype=torch.float64).view(-1, 2).unbind(1)
    return power, error


def layer_power(power: Tensor, error: Tensor) -> tuple[float, float]:
    """Mean and error of the heads' fits [Hq]; heads that differ make the error larger, NaN heads are left out."""
    power, error = power[power.isfinite()], error[power.isfinite()]
    heads = max(len(power), 1)
    spread = power.std() if len(power) > 1 else 0.0
    return float(power.mean()), max(float(error.square().sum().sqrt()) / heads, float(spread) / heads**0.5)


def power_of(power: float, error: float) -> float | None:
    """Name the power of `POWERS` that a fit means; None where it lies, within two errors, in no single range."""
    for named, (low, high) in POWERS.items():
        if low < power - 2 * error and power + 2 * error < high:
            return named
    return None


def described(power: float, error: float) -> str:
    """A fit as text, such as "1/2 (0.58 +- 0.06)"."""
    if math.isnan(power):
        return "not enough rows"
    named = power_of(power, error)
    name = "unclear" if named is None else "1/2" if named == 0.5 else f"{named:g}"
    return f"{name} ({power:.2f} +- {error:.2f})"


def _sampled(counts: Tensor, k_len: int) -> Iterator[Tensor]:
    """Indices of rows with enough keys, by bins of ln n; counts [Sq]."""
    rows = (counts >= _KEYS).nonzero()[:, 0]
    if len(rows) == 0:
        return
    octave = counts[rows].log2()
    bins = ((octave - math.log2(_KEYS)) / math.log2(max(k_len, 2 * _KEYS) / _KEYS) * _BINS).long().clamp(max=_BINS - 1)
    most = max(8, min(_ROWS, _PAIRS // k_len) // _BINS)
    for one in range(_BINS):
        found = rows[bins == one]
        if len(found):
            yield found[torch.linspace(0, len(found) - 1, min(most, len(found)), device=rows.device).long()]


def _visible(seen: Visibility, entry: int, head: int, rows: Tensor) -> Tensor:
    """The visible pairs of some rows of one head, bool [rows, Sk]."""
    key = torch.arange(seen.k_len, device=rows.device)
    lo, hi = (bound[min(entry, len(bound) - 1), rows, None] for bound in seen.ranges())
    visible = (key >= lo) & (key < hi)
    if seen.mask is not None:
        mask = seen.mask.expand(seen.batch, seen.q_heads, -1, -1)[entry, head]
        visible = visible & mask.expand(seen.q_len, -1)[rows]
    return visible


def _critical(x: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """n, ln b* and depth of rows x [rows, Sk], -inf where hidden.

    depth   where the maximum is attained: 0 by the nearest competitors, 1 by all keys
    """
    ordered = x.sort(-1, descending=True).values
    gaps = ordered[:, :1] - ordered[:, _COMPETITORS:]
    c = torch.arange(_COMPETITORS, x.shape[-1], device=x.device, dtype=torch.float64)
    critical, index = (c.log() / gaps).max(-1)
    depth = (c[index] / _COMPETITORS).log() / ((n - 1) / _COMPETITORS).log()
    return n, critical.log(), depth


def _fit(found: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[float, float]:
    """Slope and standard error of ln b* over ln ln n, from groups of rows."""
    kept = [[x[part[1].isfinite()] for x in part] for part in found]
    sizes = [len(part[0]) for part in kept]
    groups = sum(size > 0 for size in sizes)
    if groups < _GROUPS:
        return math.nan, math.nan
    n, y, depth = (torch.cat(parts) for parts in zip(*kept, strict=True))
    if n.max() < _SPREAD * n.min():
        return math.nan, math.nan
    x = (n if depth.mean() > 0.5 else n / 3).log().log()
    x = x - x.mean()
    slope = (x * y).sum() / x.square().sum()
    residual = y - y.mean() - slope * x
    sums = torch.stack([part.sum() for part in (x * residual).split(sizes)])
    error = (sums.square().sum() * groups / (groups - 2)).sqrt() / x.square().sum()
    return float(slope), float(error)
