"""`Monitor` as a callback of transformers' Trainer."""

from __future__ import annotations

from typing import Any

from ..core.errors import install

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(f"Monitor.callback needs transformers: {install('hf')}") from error


class MonitorCallback(TrainerCallback):
    """Open a monitor for a training, and end its step with every optimizer step.

    A monitor that is already inside its with block stays open at the end.
    """

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor
        self._opened = False
        self._grad_scale = 1.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._monitor.active:
            self._monitor.restart(state.global_step)
        else:
            self._monitor.steps = state.global_step
            self._monitor.__enter__()
            self._opened = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        scaler = getattr(optimizer, "scaler", None)  # accelerate's, in fp16; update() changes it before on_step_end
        self._grad_scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._monitor.step(grad_scale=self._grad_scale)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._opened:
            self._opened = False
            self._monitor.__exit__(None, None, None)
