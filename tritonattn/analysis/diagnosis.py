"""`diagnose`: the health of a softmax, head by head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import Tensor

from ..calls.attention import batch_visibility
from ..calls.checks import check, operands
from ..calls.dispatch import logits
from ..calls.public import public
from ..core.call import Request
from ..core.norms import key_norms_of
from ..core.records import FIGURES
from ..core.statistics import Statistics
from ..core.terms import Terms
from ..core.visibility import Visibility
from ..scaling import Scaling
from ..scaling.names import ModeName
from .fading import gaps_of, half_at, logit_bound
from .gaps import count_power, described
from .row_statistics import RowStatistics, row_statistics

# A row is nearly one-hot above this max probability, and nearly uniform above this entropy / ln(n).
ONE_HOT = 0.95
UNIFORM = 0.98


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Figures of every query head, fp64 [Hq]; means are over the rows with a visible key.

    logit_std             mean standard deviation of a row's logits
    max_logit             the largest logit; -inf without rows
    max_probability       mean of the rows' largest probabilities
    relative_entropy      mean entropy / ln(n) of the rows of n > 1 visible keys: 1 is uniform, 0 a single key
    jacobian_norm         mean Frobenius norm of the softmax's Jacobian, diag(p) - p p^T
    gradient_norm         mean Frobenius norm of dp / d(q . k), the Jacobian times the factor of the logits
    near_one_hot          share of the rows whose max probability is above 0.95, rows of one key included
    near_uniform          share of the rows with n > 1 keys whose entropy / ln(n) is above 0.98
    key_count_mean        mean n of the rows
    key_count_variation   their standard deviation over their mean
    key_norm_mean         mean norm ||k|| of the keys of its key head that some row attends to
    key_norm_variation    their standard deviation over their mean
    count_power           p of the factor (ln n)^p that the gaps of the largest logits ask for, and its
    count_power_error     standard error: `analysis.gaps`; NaN where rows are too few or their n too alike
    gap                   mean over the rows of n > 1 keys of the gap g of `fading`
    logit_bound           mean over the rows of the largest logit that q and k of these norms can have

    NaN if there is no such row or key. The variation of zeros is 0.

    >>> import torch
    >>> from tritonattn.analysis import diagnose
    >>> found = diagnose(*torch.randn(2, 1, 4, 64, 32), causal=True)
    >>> found.key_count_mean.tolist()
    [32.5, 32.5, 32.5, 32.5]
    """

    logit_std: Tensor
    max_logit: Tensor
    max_probability: Tensor
    relative_entropy: Tensor
    jacobian_norm: Tensor
    gradient_norm: Tensor
    near_one_hot: Tensor
    near_uniform: Tensor
    key_count_mean: Tensor
    key_count_variation: Tensor
    key_norm_mean: Tensor
    key_norm_variation: Tensor
    count_power: Tensor
    count_power_error: Tensor
    gap: Tensor
    logit_bound: Tensor

    @property
    def half_at(self) -> Tensor:
        """n at which the mass of the largest key falls to 1/2 if the gap stays: 1 + e^gap, [Hq]."""
        return half_at(self.gap)

    def table(self) -> str:
        """One line per head, as text."""
        columns = {header: [f"{x:.3g}" for x in getattr(self, name).tolist()] for name, header in _HEADERS.items()}
        columns["power of ln n\nby gaps"] = list(
            map(described, self.count_power.tolist(), self.count_power_error.tolist())
        )
        columns["mass half\nat n"] = [f"{n:.3g}" for n in self.half_at.tolist()]
        rows = [[head, *values] for head, values in enumerate(zip(*columns.values(), strict=True))]
        return tabulate(rows, ["head", *columns], "simple", **FIGURES)


_HEADERS = {
    "logit_std": "logit\nstd",
    "max_logit": "max\nlogit",
    "max_probability": "max\np",
    "relative_entropy": "entropy\n/ ln n",
    "jacobian_norm": "Jacobian\nnorm",
    "gradient_norm": "gradient\nnorm",
    "near_one_hot": "near\none-hot",
    "near_uniform": "near\nuniform",
    "key_count_mean": "keys\nmean",
    "key_count_variation": "keys\nvariation",
    "key_norm_mean": "||k||\nmean",
    "key_norm_variation": "||k||\nvariation",
    "gap": "gap",
    "logit_bound": "logit\nbound",
}


@public()
@torch.no_grad()
def diagnose(
    q: Tensor,
    k: Tensor,
    *,
    scaling: ModeName | str | Scaling | float | Tensor = "sqrt_dim",
    gain: float | Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None,
    key_ranges: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Diagnosis:
    """Measure how sharp the softmax of `attention(q, k, v, ...)` is, and how much of a gradient passes it.

        z[i, j] = gain[i] * factor[i, j] * (q[i] . k[j])       over the n keys j visible to row i
        p[i]    = softmax(z[i])
        J[i]    = diag(p[i]) - p[i] p[i]^T                     dp / dz, the softmax's Jacobian
        dp / d(q . k) = J[i] diag(gain[i] * factor[i])

    A gradient vanishes in two ways: p is one-hot (J is 0), or p is uniform since the factor is tiny (J is healthy, its
    product with the factor is not). `near_one_hot` and `near_uniform` count such rows, `gradient_norm` measures both.
    It leaves out the factor's dependence on q or k. `count_power` says how the factor should grow with n, by the
    gaps between the largest q . k of rows of different n. `gap` and `half_at` say at how many keys attention fades if
    the factor does not grow: `tritonattn.analysis.fading`. Normalised q and k (QK-norm), cosine and softcap bound the
    logits, and with them the gap; `logit_bound` says by how much.

    Args:
        q: [B, Hq, Sq, D], float16, bfloat16, float32 or float64.
        k: [B, Hkv, Sk, D] in q's dtype; Hkv divides Hq.

    The other arguments are those of `attention`, with its defaults and errors. softcap bounds `gap` and `logit_bound`
    only; the other figures are of uncapped logits. Everything is computed in float64, in
    passes over blocks of keys: memory is O(S D), no [Sq, Sk] tensor is made. Nothing is differentiated. On a CPU it
    takes about 25 times as long as a forward pass of `attention`.

    Returns:
        `Diagnosis`, of tensors [Hq] on q's device: means over the batch and its rows. Rows without keys are left out.

    Raises:
        TypeError, ValueError: As `attention`.

    >>> import torch
    >>> from tritonattn.analysis import diagnose
    >>> q, k = torch.randn(2, 1, 4, 64, 32)
    >>> diagnose(q, k, scaling="key_norm_sum", causal=True).near_uniform.shape
    torch.Size([4])

    Sources: Bernhard 2023, arXiv:2311.09406 (max and variance of the softmax's output, and its Jacobian, as signs of a
    vanishing gradient); Zhai et al. 2023, arXiv:2303.06296 (low entropy as a sign of unstable training);
    Velickovic et al. 2024, arXiv:2410.01104 (bounded logits disperse as n grows);
    arXiv:2605.12697 and arXiv:2510.05554 (powers of ln n, see `tritonattn.analysis.gaps`).
    """
    q, k, _ = operands(q, k, k)
    visibility = batch_visibility(q, k, causal, window, key_lengths, key_ranges, mask)
    request = check(Request(q, k, k, visibility, Terms(softcap=softcap), scaling, gain))
    rows = row_statistics(request)
    with torch.autocast(q.device.type, enabled=False):
        terms = logits(request, Statistics(k, visibility))
    power, error = count_power(q, k, terms.key_scale, rows.factor.sign(), visibility)
    bound = logit_bound(q, k, terms.key_scale, rows.factor, visibility, terms.softcap_of_rows())
    gap = gaps_of(rows, terms.softcap_of_rows())
    return Diagnosis(
        **_of_rows(rows),
        **_of_keys(k, visibility),
        count_power=power,
        count_power_error=error,
        gap=_mean(gap, rows.key_count > 1),
        logit_bound=_mean(bound, rows.key_count > 0),
    )


def _of_rows(rows: RowStatistics) -> dict[str, Tensor]:
    """Average statistics of rows by head: [Hq] each."""
    seeing, several = rows.key_count > 0, rows.key_count > 1
    relative = rows.relative_entropy
    largest = torch.where(seeing, rows.max_logit, -torch.inf)
    count, variation = _mean_and_variation(rows.key_count, seeing)
    return {
        "logit_std": _mean(rows.logit_std, seeing),
        "max_logit": torch.nn.functional.pad(largest, (0, 1), value=-torch.inf).amax((0, 2)),
        "max_probability": _mean(rows.max_probability, seeing),
        "relative_entropy": _mean(relative, several),
        "jacobian_norm": _mean(rows.jacobian_norm, seeing),
        "gradient_norm": _mean(rows.gradient_norm, seeing),
        "near_one_hot": _mean((rows.max_probability > ONE_HOT).double(), seeing),
        "near_uniform": _mean((relative > UNIFORM).double(), several),
        "key_count_mean": count,
        "key_count_variation": variation,
    }


def _of_keys(k: Tensor, visibility: Visibility) -> dict[str, Tensor]:
    """Mean and variation of the norms of the keys that some row attends to, [Hq] each."""
    seen = visibility.seen_keys().expand(visibility.keys)
    found = _mean_and_variation(key_norms_of(k).double(), seen)
    mean, variation = (x.repeat_interleave(visibility.q_heads // max(visibility.kv_heads, 1)) for x in found)
    return {"key_norm_mean": mean, "key_norm_variation": variation}


def _mean(x: Tensor, counted: Tensor) -> Tensor:
    """Mean of the counted x [B, H, S] over the batch and S: [H]; NaN if nothing is counted."""
    return torch.where(counted, x, 0).sum((0, 2)) / counted.sum((0, 2))


def _mean_and_variation(x: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the counted x, and standard deviation over mean: [H] each."""
    mean = _mean(x, counted)
    deviation = _mean((x - mean[:, None]).square(), counted).sqrt()
    return mean, torch.where(deviation == 0, 0, deviation / mean)
