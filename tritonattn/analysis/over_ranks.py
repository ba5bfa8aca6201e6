"""Statistics of a step joined over the ranks of torch.distributed, as if one process had seen all of their rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .tally import SUMS, Totals


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without torch.distributed."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gathered(x: Any) -> list[Any]:
    """An object of every rank."""
    everyone: list[Any] = [None] * rank_and_size()[1]
    torch.distributed.all_gather_object(everyone, x)
    return everyone


def joined_losses(step: int, loss: float | None, not_finite: bool) -> tuple[float | None, bool]:
    """The mean loss of the ranks that have one, and whether any has seen one that was not finite.

    Raises RuntimeError on all ranks if they are not in the same step.
    """
    everyone = gathered((step, loss, not_finite))
    steps = sorted({one[0] for one in everyone})
    if len(steps) > 1:
        raise RuntimeError(f"Monitor: expected all ranks in the same step, got {steps}")
    losses = [one[1] for one in everyone if one[1] is not None]
    mean = math.fsum(losses) / len(losses) if losses and all(map(math.isfinite, losses)) else math.nan
    return (mean if losses else None), any(one[2] for one in everyone)


def joined(totals: dict[str, Totals], device: torch.device) -> dict[str, tuple[Totals, int]]:
    """The totals of every layer that a rank has seen, and by how many ranks the gradients of q and k are averaged.

    Ranks with other heads (tensor parallelism) put theirs beside one another; those with the same heads (data
    parallelism) have other rows, and average the gradients of parameters. Three all-reduces on `device`.
    """
    seen: dict[str, list[_Shape]] = {}
    for shapes in gathered({name: _Shape(one) for name, one in totals.items()}):
        for name, shape in shapes.items():
            seen.setdefault(name, []).append(shape)
    names = sorted(seen)
    parts = [_Part(totals.get(name), seen[name]) for name in names]
    sums = _reduced([part.sums() for part in parts], "SUM", device)
    largest = _reduced([part.largest() for part in parts], "MAX", device)
    means = [part.mean(total) for part, total in zip(parts, sums, strict=True)]
    rest = _reduced([part.deviations(mean) for part, mean in zip(parts, means, strict=True)], "SUM", device)
    return {
        name: (part.total(*measures), part.averaged)
        for name, part, *measures in zip(names, parts, sums, largest, means, rest, strict=True)
    }


class _Shape:
    """Facts of a layer that ranks tell one another before they add."""

    def __init__(self, totals: Totals) -> None:
        self.head_part, self.calls = totals.head_part, totals.calls
        self.q_heads, self.features = totals.mean.shape
        self.k_heads = 0 if totals.k_squares is None else totals.k_squares.shape[0]
        self.has_q = totals.q_squares is not None


class _Part:
    """This rank's part of a layer, as vectors over the heads of all ranks: those of others are 0."""

    def __init__(self, own: Totals | None, shapes: list[_Shape]) -> None:
        self._own, self._calls = own, max(shape.calls for shape in shapes)
        number, count = (0, 1) if own is None else own.head_part
        count = max(count, *(shape.head_part[1] for shape in shapes))
        self.averaged = max(1, len(shapes) // count)
        self._count, self._number = count, number
        self._q_heads, self._k_heads = (max(getattr(s, x) for s in shapes) * count for x in ("q_heads", "k_heads"))
        self._features, self._has_q = shapes[0].features, any(shape.has_q for shape in shapes)

    def _placed(self, x: Tensor | None, *shape: int, fill: float = 0.0) -> Tensor:
        """x [own heads, ...] at its place in a shape [all heads, ...], flat."""
        out = torch.full(shape, fill, dtype=torch.float64)
        if x is not None:
            first = self._number * x.shape[0]
            out[first : first + x.shape[0]] = x
        return out.flatten()

    def sums(self) -> Tensor:
        own = self._own
        rows = [self._placed(None if own is None else own.sums[name], self._q_heads) for name in SUMS]
        squares = [
            self._placed(None if own is None else own.q_squares, self._q_heads),
            self._placed(None if own is None else own.k_squares, self._k_heads),
        ]
        total = None if own is None else own.mean * own.sums["real_rows"][:, None]
        return torch.cat([*rows, *squares, self._placed(total, self._q_heads, self._features)])

    def _split(self, sums: Tensor) -> tuple[Tensor, ...]:
        sizes = [self._q_heads] * (len(SUMS) + 1) + [self._k_heads, self._q_heads * self._features]
        return sums.split(sizes)

    def largest(self) -> Tensor:
        return self._placed(None if self._own is None else self._own.max_logit, self._q_heads, fill=-math.inf)

    def mean(self, sums: Tensor) -> Tensor:
        rows, total = self._split(sums)[0], self._split(sums)[-1]
        return total.view(self._q_heads, self._features) / rows.clamp(min=1)[:, None]

    def deviations(self, mean: Tensor) -> Tensor:
        """Squared deviations of this rank's rows from all ranks' mean: sum over rows, mean over features."""
        if self._own is None:
            return self._placed(None, self._q_heads)
        heads = self._own.mean.shape[0]
        shift = self._own.mean - mean[self._number * heads : (self._number + 1) * heads]
        own = self._own.deviations + self._own.sums["real_rows"] * shift.square().mean(-1)
        return self._placed(own, self._q_heads)

    def total(self, sums: Tensor, largest: Tensor, mean: Tensor, deviations: Tensor) -> Totals:
        *rows, q_squares, k_squares, _ = self._split(sums)
        return Totals(
            self._calls,
            dict(zip(SUMS, rows, strict=True)),
            largest,
            mean,
            deviations,
            q_squares if self._has_q else None,
            k_squares if self._k_heads else None,
        )


def _reduced(vectors: list[Tensor], operation: str, device: torch.device) -> list[Tensor]:
    """Vectors of the same sizes on every rank, added or maximised over ranks in one message."""
    if not vectors:
        return []
    flat = torch.cat(vectors).to(device)
    torch.distributed.all_reduce(flat, getattr(torch.distributed.ReduceOp, operation))
    return list(flat.cpu().split([x.numel() for x in vectors]))
