"""Measures of the softmax on random queries and keys, and of the gradients that reach q and k."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ...analysis.diagnosis import ONE_HOT, UNIFORM
from ...analysis.row_statistics import RowStatistics, row_statistics
from ...calls.attention import attention
from ...core.call import Request
from ...core.terms import Terms
from ...core.visibility import Visibility
from ...scaling.names import named_scaling
from .distributions import DISTRIBUTIONS

_ROWS = 32  # queries of each set of keys
_MOST_SETS, _KEYS = 64, 1 << 13  # the most sets of keys, and the most keys in all of them; at least one set


@dataclass(frozen=True)
class Point:
    """A point of the sweep: the distribution of keys, their number n, and the head dim."""

    keys: str
    count: int
    dim: int


@dataclass(frozen=True)
class Sample:
    """Random operands: q [sets, 1, rows, D], k and v [sets, 1, n, D], fp64.

    weights, the gradient of the output, has rows of norm 1.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor

    @classmethod
    def of(cls, point: Point, seed: int, device: torch.device) -> Sample:
        """Draw the sample of a point; a seed always gives the same one."""
        random = torch.Generator().manual_seed(seed)
        sets = max(1, min(_MOST_SETS, _KEYS // point.count))
        counts = _ROWS, point.count, point.count, _ROWS
        shapes = ((sets, 1, count, point.dim) for count in counts)
        q, k, v, weights = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)
        k = DISTRIBUTIONS[point.keys](k, random)
        return cls(*(x.to(device) for x in (q, k, v, weights / weights.norm(dim=-1, keepdim=True))))


@dataclass(frozen=True)
class Measures:
    """Means over the rows of a sample; the first six fields have the names that they have in `RowStatistics`.

    near_one_hot   share of the rows whose max probability is above 0.95
    near_uniform   share of the rows whose entropy / ln(n) is above 0.98
    q_gradient     ||dL/dq|| of a row, where dL/dout of every row has norm 1 and v is standard normal
    k_gradient     ||dL/dk|| over all keys of a set, divided by sqrt(rows): what one row adds

    The last two go through v and through the factor's dependence on q and k.
    """

    logit_std: float
    max_probability: float
    relative_entropy: float
    output_variance: float
    jacobian_norm: float
    gradient_norm: float
    near_one_hot: float
    near_uniform: float
    q_gradient: float
    k_gradient: float


MEASURES = tuple(field.name for field in fields(Measures))


def statistics_of(
    q: Tensor, k: Tensor, mode: str, key_lengths: Tensor | None = None, gain: Tensor | None = None
) -> RowStatistics:
    """Compute `row_statistics` for a mode in SCALINGS."""
    visible = Visibility.of(q, k, key_lengths=key_lengths)
    return row_statistics(Request(q, k, k, visible, Terms(), named_scaling(mode), gain))


def softmax_measures(rows: RowStatistics) -> dict[str, float]:
    """Compute the measures that need no gradient, for rows of at least two visible keys."""
    means = {name: getattr(rows, name) for name in MEASURES[:6]} | {
        "near_one_hot": (rows.max_probability > ONE_HOT).double(),
        "near_uniform": (rows.relative_entropy > UNIFORM).double(),
    }
    return {name: float(x.mean()) for name, x in means.items()}


def measure(sample: Sample, mode: str) -> Measures:
    """Measure a mode in SCALINGS on a sample."""
    q, k = (x.detach().requires_grad_() for x in (sample.q, sample.k))
    out = attention(q, k, sample.v, scaling=mode, backend="sdpa")
    assert isinstance(out, Tensor)
    of_q, of_k = torch.autograd.grad(out, (q, k), sample.weights)
    return Measures(
        **softmax_measures(statistics_of(sample.q, sample.k, mode)),
        q_gradient=float(of_q.norm(dim=-1).mean()),
        k_gradient=float(of_k.norm(dim=(-2, -1)).mean()) / math.sqrt(q.shape[2]),
    )


def points_of(counts: tuple[int, ...], dims: tuple[int, ...], keys: tuple[str, ...]) -> list[Point]:
    """Combine every count with all dimensions for the first distribution, with all others for the first dimension."""
    pairs = [(keys[0], dim) for dim in dims] + [(name, dims[0]) for name in keys[1:]]
    return [Point(name, count, dim) for name, dim in pairs for count in counts]
