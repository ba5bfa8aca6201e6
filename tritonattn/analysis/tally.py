"""Statistics of one attention layer in a step, by head, from any number of calls."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core.observation import ObservedCall
from ..core.visibility import Visibility
from .diagnosis import ONE_HOT, UNIFORM
from .row_statistics import relative_entropy


class Tally:
    """Sums over the calls of one layer, kept on the device until `summary` reads them."""

    def __init__(self) -> None:
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

    def summary(self, grad_scale: float = 1.0) -> dict[str, Any] | None:
        """The measures as lists, one number or None a head; None if no call was counted."""
        if not self._calls:
            return None
        calls = [{name: x.cpu() for name, x in sums.items()} for sums in self._calls]
        names = ("real_rows", "rows", "entropy", "one_hot", "uniform")
        total = {name: torch.stack([one[name] for one in calls]).sum(0) for name in names}
        largest = torch.stack([one["max_logit"] for one in calls]).amax(0)
        return {
            "calls": len(calls),
            "rows": int(total["real_rows"].sum()),
            "max_logit": _numbers(largest, total["real_rows"]),
            "relative_entropy": _numbers(total["entropy"] / total["rows"], total["rows"]),
            "near_one_hot": _numbers(total["one_hot"] / total["real_rows"], total["real_rows"]),
            "near_uniform": _numbers(total["uniform"] / total["rows"], total["rows"]),
            "q_gradient_norm": _norm(self._q_squares, grad_scale),
            "k_gradient_norm": _norm(self._k_squares, grad_scale),
            "output_variance": _numbers(_variance(calls), total["real_rows"]),
        }


def counted_rows(seen: Visibility) -> Tensor:
    """The rows that see a key and are no padding: bool [B or 1, 1 or Hq, Sq].

    A row of self attention is padding if no row sees the key at its place. In cross attention padding of rows is not
    known, so all rows count, except if Sq = Sk by chance: then rows at the places of unseen keys are left out.
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


def _variance(calls: list[dict[str, Tensor]]) -> Tensor:
    """Variance of every feature over the rows of all calls, averaged over the features: [Hq].

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
    return (deviations / count.clamp(min=1)).mean(-1)


def _square(gradient: Tensor) -> Tensor:
    """Sum of squares by head: fp32 [H]."""
    return torch.linalg.vector_norm(gradient.detach(), dim=(0, 2, 3), dtype=torch.float32).double().square()


def _norm(squares: list[Tensor], grad_scale: float) -> list[float | None] | None:
    if not squares:
        return None
    norms = torch.stack([x.cpu() for x in squares]).sum(0).sqrt() / grad_scale
    return _numbers(norms, torch.ones_like(norms))


def _numbers(x: Tensor, count: Tensor) -> list[float | None]:
    """Numbers as a list, with None where nothing was counted: a NaN is one that was computed."""
    return [value if n > 0 else None for value, n in zip(x.tolist(), count.tolist(), strict=True)]
