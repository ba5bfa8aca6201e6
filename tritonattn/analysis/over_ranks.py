"""Statistics of a step joined over the ranks of torch.distributed, as if one process had seen all of their rows."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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

    Ranks with other heads (tensor parallelism) put theirs side by side; those with the same heads (data parallelism)
    have other rows, and average the gradients of parameters. Three all-reduces on `device`.
    """
    seen: dict[str, list[_Shape]] = {}
    for shapes in gathered({name: _Shape.of(one) for name, one in totals.items()}):
        for name, shape in shapes.items():
            seen.setdefault(name, []).append(shape)
    shapes = {name: _Shape(*map(max, *found, found[0])) for name, found in sorted(seen.items())}
    parts, count = [_placed(totals.get(name), shape) for name, shape in shapes.items()], len(shapes)
    sums = [torch.stack(list(one.sums.values())) for one in parts]
    squares = [torch.cat([one.q_squares, one.k_squares]) for one in parts]
    weighted = [one.mean * one.sums["real_rows"][:, None] for one in parts]
    added = _reduced([*sums, *squares, *weighted], "SUM", device)
    sums, squares, weighted = added[:count], added[count : 2 * count], added[2 * count :]
    means = [total / rows[0].clamp(min=1)[:, None] for total, rows in zip(weighted, sums, strict=True)]
    largest = _reduced([one.max_logit for one in parts], "MAX", device)
    deviations = _reduced([_deviations(one, mean) for one, mean in zip(parts, means, strict=True)], "SUM", device)
    result = {}
    for index, (name, shape) in enumerate(shapes.items()):
        of_q, of_k = squares[index].split([shape.parts * shape.q_heads, shape.parts * shape.k_heads])
        rows: dict[str, Tensor] = dict(zip(SUMS, sums[index], strict=True))
        of_q, of_k = of_q if shape.has_q else None, of_k if shape.k_heads else None
        total = Totals(shape.calls, rows, largest[index], means[index], deviations[index], of_q, of_k)
        result[name] = total, max(1, len(seen[name]) // shape.parts)
    return result


class _Shape(NamedTuple):
    """Facts of a layer that ranks tell one another before they add; its heads are those of one of the parts."""

    parts: int
    calls: int
    q_heads: int
    features: int
    has_q: bool
    k_heads: int

    @classmethod
    def of(cls, totals: Totals) -> _Shape:
        k_heads = 0 if totals.k_squares is None else totals.k_squares.shape[0]
        q_heads, features = totals.mean.shape
        return cls(totals.head_part[1], totals.calls, q_heads, features, totals.q_squares is not None, k_heads)


def _placed(own: Totals | None, shape: _Shape) -> Any:
    """A rank's totals among the heads of all ranks; 0 at those of others."""
    number = 0 if own is None else own.head_part[0]

    def among(x: Tensor | None, heads: int, *features: int, fill: float = 0.0) -> Tensor:
        out = torch.full((shape.parts, heads, *features), fill, dtype=torch.float64)
        if x is not None:
            out[number] = x
        return out.flatten(0, 1)

    q_heads, sums = shape.q_heads, {} if own is None else own.sums
    return Totals(
        shape.calls,
        {name: among(sums.get(name), q_heads) for name in SUMS},
        among(getattr(own, "max_logit", None), q_heads, fill=-math.inf),
        among(getattr(own, "mean", None), q_heads, shape.features),
        among(getattr(own, "deviations", None), q_heads),
        among(getattr(own, "q_squares", None), q_heads),
        among(getattr(own, "k_squares", None), shape.k_heads),
    )


def _deviations(own: Totals, mean: Tensor) -> Tensor:
    """Squared deviations of this rank's rows from all ranks' mean: sum over rows, mean over features."""
    return own.deviations + own.sums["real_rows"] * (own.mean - mean).square().mean(-1)


def _reduced(tensors: list[Tensor], operation: str, device: torch.device) -> list[Tensor]:
    """Tensors of the same shapes on every rank, added or maximised over ranks in one message."""
    if not tensors:
        return []
    flat = torch.cat([x.flatten() for x in tensors]).to(device)
    torch.distributed.all_reduce(flat, getattr(torch.distributed.ReduceOp, operation))
    parts = flat.cpu().split([x.numel() for x in tensors])
    return [part.view_as(x) for part, x in zip(parts, tensors, strict=True)]
