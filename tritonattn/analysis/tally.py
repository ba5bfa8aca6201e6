"""Statistics of one attention layer in a step, by head, from any number of calls."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.observation import ObservedCall
from ..core.visibility import Visibility
from .diagnosis import ONE_HOT, UNIFORM
from .row_statistics import relative_entropy

SUMS = ("real_rows", "rows", "entropy", "one_hot", "uniform")


@dataclass(frozen=True, eq=False)
class Totals:
    """Sums over the rows of one layer in a step, by head, fp64 on the CPU.

    calls       the number of calls
    sums        real_rows, rows, entropy, one_hot, uniform: [Hq]
    max_logit   [Hq]
    mean        of the output over real rows, [Hq, Dv]
    deviations  sum over real rows of squared deviations from it, mean over features: [Hq]
    q_squares   sum of squares of the gradient of q [Hq], None without backward; k_squares [Hkv] likewise
    head_part   (number, of how many): which part of the layer's heads these are, (0, 1) being all
    """

    calls: int
    sums: dict[str, Tensor]
    max_logit: Tensor
    mean: Tensor
    deviations: Tensor
    q_squares: Tensor | None
    k_squares: Tensor | None
    head_part: tuple[int, int] = (0, 1)

    def summary(self, grad_scale: float = 1.0) -> dict[str, Any]:
        """The measures as lists, one number or None a head."""
        real_rows, rows, entropy, one_hot, uniform = (self.sums[name] for name in SUMS)
        return {
            "calls": self.calls,
            "rows": int(real_rows.sum()),
            "max_logit": _numbers(self.max_logit, real_rows),
            "relative_entropy": _numbers(entropy / rows, rows),
            "near_one_hot": _numbers(one_hot / real_rows, real_rows),
            "near_uniform": _numbers(uniform / rows, rows),
            "q_gradient_norm": _norm(self.q_squares, grad_scale),
            "k_gradient_norm": _norm(self.k_squares, grad_scale),
            "output_variance": _numbers(self.deviations / real_rows.clamp(min=1), real_rows),
        }


class Tally:
    """Sums over the calls of one layer, kept on the device until `totals` reads them."""

    def __init__(self, head_part: tuple[int, int] = (0, 1)) -> None:
        self._head_part = head_part
        self._calls: list[dict[str, Tensor]] = []
        self._q_squares: list[Tensor] = []
        self._k_squares: list[Tensor] = []

    def add(self, call: ObservedCall) -> None:
        """Count the rows of a call."""
        self._calls.append(_sums(call))

    def follow_gradients(self, call: ObservedCall) -> None:
        """Collect the gradients of q and k when backward computes them."""
        for x, squares in ((call.q, self._q_squares), (call.k, self._k_squares)):
            if x.requires_grad:
                x.register_hook(lambda g, squares=squares: squares.append(_square(g)))

    def totals(self) -> Totals | None:
        """The sums over all calls; None if no call was counted."""
        if not self._calls:
            return None
        calls = [{name: x.cpu() for name, x in sums.items()} for sums in self._calls]
        sums = {name: torch.stack([one[name] for one in calls]).sum(0).double() for name in SUMS}
        largest = torch.stack([one["max_logit"] for one in calls]).amax(0)
        squares = (_total(self._q_squares), _total(self._k_squares))
        return Totals(len(calls), sums, largest, *_moments_of_all(calls), *squares, self._head_part)


def counted_rows(seen: Visibility) -> Tensor:
    """The rows with a visible key that are no padding: bool [B or 1, 1 or Hq, Sq].

    A row of self attention is padding if no row attends to the key at its position. In cross attention padding of rows
    is not known, so all rows count, except if Sq = Sk by chance: then rows at positions of unseen keys are left out.
    """
    rows = seen.counts() > 0
    if seen.q_len == seen.k_len and seen.sequences is None and not seen.depends_on_sizes_only:
        rows = rows & seen.seen_keys().any(1, keepdim=True)
    return rows


def _sums(call: ObservedCall) -> dict[str, Tensor]:
    aux, real = call.aux(), counted_rows(call.visibility)
    n = call.visibility.counts().expand(aux.entropy.shape)  # [B, Hq, Sq]
    real = real.expand(n.shape)
    several = real & (n > 1)
    top = aux.max_logit.double()
    capped = top if call.softcap is None else call.softcap * torch.tanh(top / call.softcap)
    probability = torch.exp(capped - aux.lse.double())
    relative = relative_entropy(aux.entropy, n)

    def count(x: Tensor, rows: Tensor) -> Tensor:  # [Hq]
        return torch.where(rows, x.double(), 0).sum((0, 2))

    return {
        "real_rows": real.sum((0, 2)),
        "rows": several.sum((0, 2)),
        "max_logit": torch.where(real, top, -math.inf).amax((0, 2)),
        "entropy": count(relative, several),
        "one_hot": count(probability > ONE_HOT, real),
        "uniform": count(relative > UNIFORM, several),
        **_moments(call.out, real),
    }


def _moments(out: Tensor, real: Tensor) -> dict[str, Tensor]:
    """Mean and sum of squared deviations of every feature over the real rows: [Hq, Dv]."""
    out, real = out.detach().float(), real[..., None]  # [B, Hq, Sq, Dv], [B, Hq, Sq, 1]
    count = real.sum((0, 2)).clamp(min=1)  # [Hq, 1]
    mean = torch.where(real, out, 0).sum((0, 2)) / count
    deviations = torch.where(real, out - mean[:, None], 0).square().sum((0, 2))
    return {"mean": mean.double(), "deviations": deviations.double()}


def _moments_of_all(calls: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean of every feature over the rows of all calls [Hq, Dv]; sum of squared deviations, mean over features [Hq].

    Calls are joined by the formula of Chan, Golub and LeVeque, which does not cancel.
    """
    count = torch.zeros_like(calls[0]["mean"][:, :1])
    mean, deviations = torch.zeros_like(calls[0]["mean"]), torch.zeros_like(calls[0]["mean"])
    for one in calls:
        more = one["real_rows"][:, None].double()
        both = (count + more).clamp(min=1)
        shift = one["mean"] - mean
        deviations = deviations + one["deviations"] + shift.square() * count * more / both
        mean, count = mean + shift * more / both, count + more
    return mean, deviations.mean(-1)


def _square(gradient: Tensor) -> Tensor:
    """Sum of squares by head: fp32 [H]."""
    return torch.linalg.vector_norm(gradient.detach(), dim=(0, 2, 3), dtype=torch.float32).double().square()


def _total(squares: list[Tensor]) -> Tensor | None:
    return torch.stack([x.cpu() for x in squares]).sum(0) if squares else None


def _norm(squares: Tensor | None, grad_scale: float) -> list[float | None] | None:
    if squares is None:
        return None
    norms = squares.sqrt() / grad_scale
    return _numbers(norms, torch.ones_like(norms))


def _numbers(x: Tensor, count: Tensor) -> list[float | None]:
    """Numbers as a list, with None where nothing was counted: a NaN is one that was computed."""
    return [value if n > 0 else None for value, n in zip(x.tolist(), count.tolist(), strict=True)]
