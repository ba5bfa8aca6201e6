"""A scaling that changes from one mode into another in the course of training."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..calls.checks import check_count
from ..calls.dispatch import scales_of
from ..core.hints import hinted
from ..core.optimizers import await_steps
from ..core.statistics import Statistics
from ..core.visibility import Visibility
from ..scaling import Scales, Scaling
from .learned import ScalingModule, as_mode, describe, listed

_BLENDS = ("linear", "geometric")


@hinted
class Scheduled(ScalingModule):
    """A factor that goes from mode_a's to mode_b's in a number of steps.

        t      = min(step / steps, 1)
        factor = (1 - t) * factor_a + t * factor_b        "linear"
        factor = factor_a^(1 - t) * factor_b^t            "geometric"

    `advance()` counts a step: call it once an optimiser step. At step 0 the factor is exactly mode_a's, from `steps` on
    exactly mode_b's. Without a call the factor stays mode_a's; the second step of an optimizer then warns once, unless
    the schedule is in eval mode.

    Args:
        mode_a, mode_b: Names in `SCALINGS` or Scalings, themselves learned or not.
        steps: At least 1.
        blend: "linear" takes factors of any sign, but no mode with a factor per key (cosine), which no row's factor can
            equal half-way. "geometric" takes every mode whose factors are not negative (else NaN), and moves evenly
            between modes of different size.

    The step is a buffer: state_dict keeps it, and neither compiling nor a CUDA graph fixes it.

    Raises:
        TypeError, ValueError: An invalid mode, number of steps or blend; in a call, a mode with a factor per key
            in a linear blend.

    >>> import torch, tritonattn
    >>> scaling = tritonattn.nn.Scheduled("sqrt_dim", "key_norm_mean", steps=1000)
    >>> q, k, v = torch.randn(3, 1, 4, 16, 8)
    >>> out = tritonattn.attention(q, k, v, scaling=scaling, causal=True)
    >>> scaling.advance()
    >>> scaling.progress().item()
    0.001
    """

    name = "scheduled"

    def __init__(self, mode_a: str | Scaling, mode_b: str | Scaling, steps: int, *, blend: str = "linear") -> None:
        super().__init__()
        check_count("steps", steps, 1)
        if blend not in _BLENDS:
            raise ValueError(f"blend: expected one of {', '.join(_BLENDS)}, got {blend!r}")
        self.mode_a, self.mode_b = as_mode(mode_a), as_mode(mode_b)
        self.steps, self.blend = steps, blend
        self.step: Tensor
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.is_used = False
        await_steps(_Unadvanced(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a copy or an unpickled schedule."""
        super().__setstate__(state)
        await_steps(_Unadvanced(self))

    def reset_parameters(self) -> None:
        """Start again at step 0."""
        nn.init.zeros_(self.step)

    @property
    def reads_keys(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.mode_a.reads_keys or self.mode_b.reads_keys

    @property
    def normalises_query(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.mode_a.normalises_query and self.mode_b.normalises_query

    def extra_repr(self) -> str:
        return f"{listed(self.mode_a, self.mode_b)}steps={self.steps}, blend={self.blend!r}"

    @torch.no_grad()
    def advance(self, steps: int = 1) -> None:
        """Count steps, at least 0 at a time."""
        check_count("steps", steps)
        self.step += steps

    def progress(self) -> Tensor:
        """t, an fp64 scalar from 0 to 1."""
        return (self.step.double() / self.steps).clamp(0, 1)

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        if self.training and not torch.compiler.is_exporting():
            self.is_used = True
        t = self.progress().to(q.device)
        given = q, k, visibility, statistics
        parts = [scales_of(mode, None, *given, exact=True) for mode in (self.mode_a, self.mode_b)]
        self._refuse(_FACTOR, [part.relative for part in parts])
        biases = [part.relative_bias if part.key_bias is None else part.key_bias for part in parts]
        self._refuse(_BIAS, biases)
        a, b = (x.constant if x.query is None else x.constant * x.query.double() for x in parts)
        key_a, key_b = (part.key for part in parts)
        if self.blend == "geometric":
            no_key = key_a is None and key_b is None
            key = None if no_key else _geometric(1.0 if key_a is None else key_a, 1.0 if key_b is None else key_b, t)
            return Scales(1.0, query=_geometric(a, b, t), key=key)
        if key_a is not None or key_b is not None:
            raise ValueError(
                "blend: expected 'geometric' with a mode that has a factor per key, as cosine has, got 'linear'"
            )
        return Scales(1.0, query=(1 - t) * a + t * b)

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        t = self.progress().to(q.device)
        a, b = (mode.multiplier(q, k, visible) for mode in (self.mode_a, self.mode_b))
        return (1 - t) * a + t * b if self.blend == "linear" else _geometric(a, b, t)

    def addend(self, q: Tensor, k: Tensor, visible: Tensor) -> None:
        self._refuse(_BIAS, [mode.addend(q, k, visible) for mode in (self.mode_a, self.mode_b)])

    def relative_multiplier(self, q: Tensor, k: Tensor, distance: Tensor) -> None:
        self._refuse(_FACTOR, [mode.relative_multiplier(q, k, distance) for mode in (self.mode_a, self.mode_b)])

    def relative_addend(self, q: Tensor, k: Tensor, distance: Tensor) -> None:
        self._refuse(_BIAS, [mode.relative_addend(q, k, distance) for mode in (self.mode_a, self.mode_b)])

    def _refuse(self, what: str, found: list[Tensor | None]) -> None:
        """Raise where mode_a or mode_b has a part that is not blended."""
        for name, x in zip(("mode_a", "mode_b"), found, strict=True):
            if x is not None:
                raise ValueError(f"{name}: expected a mode without {what}, got {describe(getattr(self, name))}")


class _Unadvanced:
    """A schedule until its step has changed between two steps of an optimizer, or has not."""

    def __init__(self, scheduled: Scheduled) -> None:
        self._scheduled, self._versions = weakref.ref(scheduled), {}

    def is_settled(self, optimizer: Optimizer) -> bool:
        scheduled = self._scheduled()
        if scheduled is None or scheduled.step.is_inference():
            return True
        if not scheduled.training or not scheduled.is_used:
            return False
        scheduled.is_used = False  # until a call takes its factor again
        version = scheduled.step._version  # which every change in place moves on, and no one has to wait for
        if id(optimizer) not in self._versions:
            self._versions[id(optimizer)] = version
            return False
        before = self._versions[id(optimizer)]
        is_same = before == version
        if is_same:
            warnings.warn(
                f"advance: expected a call of nn.Scheduled.advance() once an optimiser step, got none between two steps"
                f" of {type(optimizer).__name__}, so that the factor stays as it is: call it after optimizer.step(), or"
                " eval() of a schedule that is not trained",
                stacklevel=4,
            )
        return True


_FACTOR = "a factor of distances"
_BIAS = "a bias (pass it as key_bias= or relative_bias=, times a weight)"


def _geometric(a: Tensor | float, b: Tensor | float, t: Tensor) -> Tensor:
    """a^(1 - t) * b^t in fp64."""
    a, b = (torch.as_tensor(x, dtype=torch.float64, device=t.device) for x in (a, b))
    return _power(a, 1 - t) * _power(b, t)


def _power(x: Tensor, exponent: Tensor) -> Tensor:
    """x^exponent, with gradient 0 towards an x of 0."""
    zero = x == 0
    return torch.where(zero, (exponent == 0).double(), torch.where(zero, 1, x).pow(exponent))
