"""Sums over the rows of one attention layer in a step, by head, which add over calls and over ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..calls.checks import scale_dtype
from ..core.observation import ObservedCall
from ..core.visibility import Visibility
from .diagnosis import ONE_HOT, UNIFORM
from .over_ranks import gathered, reduced
from .row_statistics import relative_entropy


@dataclass(frozen=True, eq=False)
class Totals:
    """The rows of one layer in a step, by head, fp64 on the CPU.

    calls       the number of calls
    sums        real_rows, rows (of several keys), entropy, one_hot, uniform: [Hq]; output [Hq, Dv]; output_squares
                [Hq], mean over features; q_squares [Hq] and k_squares [Hkv] of gradients, where a backward was
    max_logit   [Hq]
    head_part   (number, of how many): which part of the layer's heads these are, (0, 1) being all
    """

    calls: int
    sums: dict[str, Tensor]
    max_logit: Tensor
    head_part: tuple[int, int] = (0, 1)

    def summary(self, grad_scale: float = 1.0) -> dict[str, Any]:
        """The measures as lists, one number or None per head."""
        sums = self.sums
        real_rows, rows, count = sums["real_rows"], sums["rows"], sums["real_rows"].clamp(min=1)
        means = (sums["output"] / count[:, None]).square().mean(-1)
        return {
            "calls": self.calls,
            "rows": int(real_rows.sum()),
            "max_logit": _numbers(self.max_logit, real_rows),
            "relative_entropy": _numbers(sums["entropy"] / rows, rows),
            "near_one_hot": _numbers(sums["one_hot"] / real_rows, real_rows),
            "near_uniform": _numbers(sums["uniform"] / rows, rows),
            "q_gradient_norm": _norms(sums.get("q_squares"), grad_scale),
            "k_gradient_norm": _norms(sums.get("k_squares"), grad_scale),
            "output_variance": _numbers((sums["output_squares"] / count - means).clamp(min=0), real_rows),
        }


class Tally:
    """Sums over the calls of one layer, kept on the device until `totals` reads them."""

    def __init__(self, head_part: tuple[int, int]) -> None:
        self._head_part = head_part
        self._sums: list[dict[str, Tensor]] = []
        self._largest: list[Tensor] = []

    def add(self, call: ObservedCall) -> None:
        """Count the rows of a call."""
        sums, largest = _of_call(call)
        self._sums.append(sums)
        self._largest.append(largest)

    def follow_gradients(self, call: ObservedCall) -> None:
        """Collect the gradients of q and k when backward computes them."""
        for name, x in (("q_squares", call.q), ("k_squares", call.k)):
            if x.requires_grad:
                x.register_hook(lambda g, name=name: self._sums.append({name: _square(g)}))

    def totals(self) -> Totals | None:
        """The sums over all calls; None if no call was counted."""
        if not self._largest:
            return None
        total: dict[str, Tensor] = {}
        for sums in self._sums:
            for name, x in sums.items():
                x = x.cpu().double()
                total[name] = total[name] + x if name in total else x
        largest = torch.stack([x.cpu() for x in self._largest]).amax(0)
        return Totals(len(self._largest), total, largest, self._head_part)


class _Facts(NamedTuple):
    """Facts of a layer that ranks exchange before they add: the shapes of its sums on each rank."""

    parts: int
    calls: int
    shapes: dict[str, torch.Size]


def totals_over_ranks(totals: dict[str, Totals], device: torch.device) -> dict[str, tuple[Totals, int]]:
    """The totals of every layer that some rank has seen, and how many ranks average the gradients of q and k.

    Ranks with other heads (tensor parallelism) put theirs side by side; those with the same heads (data parallelism)
    have other rows, and average the gradients of parameters. Two all-reduces on `device`.
    """
    everyone = gathered(
        {
            name: _Facts(one.head_part[1], one.calls, {key: x.shape for key, x in one.sums.items()})
            for name, one in totals.items()
        }
    )
    layers = {name: [facts[name] for facts in everyone if name in facts] for name in sorted(set().union(*everyone))}
    sums, largest = {}, {}
    for name, found in layers.items():
        mine, parts = totals.get(name), found[0].parts
        for key, shape in {key: shape for facts in found for key, shape in facts.shapes.items()}.items():
            sums[name, key] = _placed(mine, None if mine is None else mine.sums.get(key), parts, shape)
        heads = found[0].shapes["rows"]
        largest[name] = _placed(mine, None if mine is None else mine.max_logit, parts, heads, -math.inf)
    sums, largest = reduced(sums, "SUM", device), reduced(largest, "MAX", device)
    result = {}
    for name, found in layers.items():
        of_layer = {key: x for (layer, key), x in sums.items() if layer == name}
        total = Totals(max(facts.calls for facts in found), of_layer, largest[name])
        result[name] = total, max(1, len(found) // found[0].parts)
    return result


def _placed(mine: Totals | None, x: Tensor | None, parts: int, shape: torch.Size, fill: float = 0.0) -> Tensor:
    """A rank's numbers in place among the heads of all ranks, with `fill` for heads of other ranks."""
    out = torch.full((parts, *shape), fill, dtype=torch.float64)
    if mine is not None and x is not None:
        out[mine.head_part[0]] = x
    return out.flatten(0, 1)


def counted_rows(seen: Visibility) -> Tensor:
    """The rows with a visible key that are not padding: bool [B or 1, 1 or Hq, Sq].

    A row of self attention is padding if no row attends to the key at its position. In cross attention padding of rows
    is not known, so all rows count, except if Sq = Sk by chance: then rows at positions of unseen keys are left out.
    """
    rows = seen.counts() > 0
    if seen.q_len == seen.k_len and seen.sequences is None and not seen.depends_on_sizes_only:
        rows = rows & seen.seen_keys().any(1, keepdim=True)
    return rows


def _of_call(call: ObservedCall) -> tuple[dict[str, Tensor], Tensor]:
    """The sums over the rows of a call, without gradients, and the largest logit of each head."""
    found, real = call.rows(), counted_rows(call.visibility)
    n = call.visibility.counts().expand(found.entropy.shape)  # [B, Hq, Sq]
    real = real.expand(n.shape)
    several = real & (n > 1)
    relative = relative_entropy(found.entropy, n)

    def count(x: Tensor, rows: Tensor) -> Tensor:  # [Hq]
        return torch.where(rows, x.double(), 0).sum((0, 2))

    sums = {
        "real_rows": real.sum((0, 2)),
        "rows": several.sum((0, 2)),
        "entropy": count(relative, several),
        "one_hot": count(found.max_probability > ONE_HOT, real),
        "uniform": count(relative > UNIFORM, several),
        **_of_output(call.out, real),
    }
    return sums, torch.where(real, found.max_logit.double(), -math.inf).amax((0, 2))


def _of_output(out: Tensor, real: Tensor) -> dict[str, Tensor]:
    """Sum of every feature over the real rows [Hq, Dv], and of its square, mean over features [Hq]; fp64.

    The squares are those of deviations from the mean plus that of the mean: fp32 takes squares of large numbers, and
    their small differences, wrong.
    """
    out, real = out.detach().to(scale_dtype(out)), real[..., None]  # [B, Hq, Sq, Dv], [B, Hq, Sq, 1]
    count = real.sum((0, 2))  # [Hq, 1]
    mean = torch.where(real, out, 0).sum((0, 2)) / count.clamp(min=1)
    deviations = torch.where(real, out - mean[:, None], 0).square().sum((0, 2)).double()
    mean = mean.double()
    return {"output": mean * count, "output_squares": (deviations + mean.square() * count).mean(-1)}


def _square(gradient: Tensor) -> Tensor:
    """Sum of squares by head: fp64 [H], added in fp32 (fp64 for fp64)."""
    return torch.linalg.vector_norm(gradient.detach(), dim=(0, 2, 3), dtype=scale_dtype(gradient)).double().square()


def _norms(squares: Tensor | None, grad_scale: float) -> list[float] | None:
    return None if squares is None else (squares.sqrt() / grad_scale).tolist()


def _numbers(x: Tensor, count: Tensor) -> list[float | None]:
    """Numbers as a list, with None where nothing was counted: a NaN is one that was computed."""
    return [value if n > 0 else None for value, n in zip(x.tolist(), count.tolist(), strict=True)]
