"""The simulations of Bernhard 2023, arXiv:2311.09406: 32 keys, 500 queries, independent standard normal components.

Figures 1 and 2 of the paper are density plots of one component of a row, the value of key 1, over the queries. The R
package that drew them mixes rows and columns, as perf/results/simulation.md says; so both readings are measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...calls.attention import attention
from .measures import softmax_measures, statistics_of

KEYS, QUERIES = 32, 500
SMALL, LARGE = 16, 256  # head dims of Figures 1 and 2


@dataclass(frozen=True)
class Panel:
    """A panel of a figure: the probabilities of a mode, or without a mode the products q . k."""

    figure: int
    letter: str
    title: str
    dim: int
    mode: str | None


PANELS = (
    Panel(1, "a", "unscaled, no softmax", SMALL, None),
    Panel(1, "b", "unscaled, softmax", SMALL, "none"),
    Panel(1, "c", "divided by sqrt(d), softmax", SMALL, "sqrt_dim"),
    Panel(2, "a", "unscaled, no softmax", LARGE, None),
    Panel(2, "b", "divided by sqrt(d), softmax", LARGE, "sqrt_dim"),
    Panel(2, "c", "divided by the sum of the keys' norms, softmax", LARGE, "key_norm_sum"),
)
# The modes that the figures compare, and two that they leave out: sums of norms at d = 16, none at d = 256.
ROWS = tuple((dim, mode) for dim in (SMALL, LARGE) for mode in ("none", "sqrt_dim", "key_norm_sum"))


@dataclass(frozen=True)
class Component:
    """500 values of a panel: of key 1 over the queries, and of column 1 in the published package's order."""

    panel: Panel
    values: Tensor
    as_published: Tensor


def operands(dim: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw q [1, 1, 500, dim] and k [1, 1, 32, dim], fp64."""
    random = torch.Generator().manual_seed(seed)
    shapes = (1, 1, QUERIES, dim), (1, 1, KEYS, dim)
    q, k = (torch.randn(shape, generator=random, dtype=torch.float64).to(device) for shape in shapes)
    return q, k


def softmax_of(q: Tensor, k: Tensor, mode: str | None) -> Tensor:
    """Compute the softmax [rows, keys] of q [1, 1, rows, D] over k [1, 1, keys, D]; without a mode the products."""
    if mode is None:
        return (q @ k.mT)[0, 0]
    values = torch.eye(k.shape[2], dtype=q.dtype, device=q.device)[None, None]  # the output is p itself
    out = attention(q, k, values, scaling=mode, backend="sdpa")
    assert isinstance(out, Tensor)
    return out[0, 0]


def component(panel: Panel, seed: int, device: torch.device) -> Component:
    """Compute the values of a panel."""
    matrix = softmax_of(*operands(panel.dim, seed, device), panel.mode).cpu()  # [queries, keys]
    # As R's matrix(t(matrix), nrow = queries) fills it, by columns: t(matrix) holds one query after another.
    published = matrix.flatten().view(KEYS, QUERIES).mT
    return Component(panel, matrix[:, 0], published[:, 0])


def measures_of(dim: int, mode: str, seed: int, device: torch.device) -> dict[str, float]:
    """Measure the softmax of the 500 rows, and the variance of key 1's probability over the queries."""
    q, k = operands(dim, seed, device)
    over_queries = softmax_of(q, k, mode)[:, 0].var(correction=1)
    return softmax_measures(statistics_of(q, k, mode)) | {"component_variance": float(over_queries)}
