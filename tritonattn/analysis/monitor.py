"""`Monitor`: statistics of a model's attention while it trains."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calls.checks import check_bool
from ..core.errors import install
from ..core.hints import hinted
from ..core.records import append
from .alarms import Alarm, Alarms, Thresholds, layer_value
from .over_ranks import joined_losses, rank_and_size
from .tally import totals_over_ranks
from .watch import Watch

Action = Callable[[Sequence[Alarm]], Any]
Log = Callable[[dict[str, float], int], Any]


@hinted
class Monitor:
    """Watch every k-th step of a training run: a context manager whose `step` is called at the end of every step.

    Args:
        model: A transformers model, patched or not, or any module that computes its attention by
            `tritonattn.attention` or `attention_varlen`: `tritonattn.nn.ScaledAttention`, `tritonattn.integrations`.
        every: Watch the steps 0, every, 2 every, ...
        file: A file to append a record to in every watched step, as JSON lines. Where that fails later, as on a full
            disk, it warns and goes on.
        tensorboard: A folder, or a writer with `add_scalar(name, value, step)`.
        log: A function of (values, step), called in every watched step with the loss and each layer's numbers: the
            largest logit and the heads' means, as "loss" and "blocks.0.attention/max_logit". wandb's `run.log`,
            `mlflow.log_metrics`, accelerate's `accelerator.log` and Lightning's `logger.log_metrics` are such.
        thresholds: Limits that raise alarms, which warn; by default `Thresholds()`.
        on_alarm: An action, besides the warning, in every watched step in which an alarm stands: "undo" calls
            `tritonattn.huggingface.patched(model).undo()`; `qk_clip(model, threshold)`; or a function of the list of
            `Alarm`s.
        reduce: Join the statistics of all ranks of torch.distributed, each of which must watch. False keeps to this
            process: one rank may then watch alone, but take no action.

    A record is a dict: step; loss; alarms; and layers, by the module's name, each with

        calls, rows          numbers of calls and rows (B Hq Sq), without padding and rows without visible keys
        max_logit            [Hq] the largest logit, before softcap and without biases
        relative_entropy     [Hq] mean over rows of n > 1 visible keys of entropy / ln n: 1 is uniform, 0 one key
        near_one_hot         [Hq] share of the rows whose largest probability is above 0.95, rows of one key included
        near_uniform         [Hq] share of the rows with n > 1 whose entropy / ln n is above 0.98
        q_gradient_norm      [Hq] Frobenius norm of the gradient that reached q as it meets k, over rows and features
        k_gradient_norm      [Hkv]
        output_variance      [Hq] variance of the attention's output over the rows, mean over its features

    Values that do not exist (no backward, no row) or are not finite are null in the file, and alarms name the latter.
    Probabilities and entropy are taken before dropout and without sinks; the output is the one that the model gets.

    **It changes nothing.** Statistics are computed by one more forward of O(S) memory, or two with biases, from the
    same q and k as the model's attention, without dropout. Weights after a run with a Monitor are bit for bit those
    without, unless `on_alarm` changes them or the model is compiled. A transformers layer that is not patched keeps its
    attention (eager or sdpa), and has another config during a watched step: so `patch` before the with block. In other
    steps `step` only counts, and checks the loss if that does not wait for a GPU.

    **A step** is everything between two calls of `step`. Forwards of several micro-batches or parts of a loss are
    joined, so gradient accumulation gives the statistics of one large batch. A layer counts in training mode, or if its
    result has a graph, so an evaluation in eval mode under torch.no_grad() does not. Checkpointed layers count once.
    Under a GradScaler give `grad_scale`. Frozen layers have gradient norms if a gradient passes through them. An
    exception ends the watch, loses the step, and leaves model and file whole.

    **torch.compile.** Watched steps run uncompiled, so every layer is seen, and no graph is compiled again:
    `torch.compiler.set_stance("force_eager")` holds until the step ends, for all that the process has compiled.

    **Threads and processes.** Monitors of different models may run in different threads, and the threads of
    nn.DataParallel count. Under torch.distributed every rank watches, with the same `every`: a record is that of one
    process with the rows and heads of all (the loss is the ranks' mean, gradients are as DDP and FSDP average them),
    every rank has it, acts on its alarms, and rank 0 writes and warns. A loss that is not finite then raises its alarm
    in the next watched step.

    Raises:
        ValueError, TypeError: A bad argument; a transformers model with an attention implementation other than eager,
            sdpa and tritonattn in a layer that is not patched.
        ImportError: A folder for tensorboard without that package.

    >>> import torch, tritonattn
    >>> from tritonattn.analysis import Monitor
    >>> model = tritonattn.nn.ScaledAttention(32, heads=4, scaling="ssmax", causal=True)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with Monitor(model, every=2) as monitor:
    ...     for _ in range(3):
    ...         loss = model(torch.randn(2, 16, 32)).square().mean()
    ...         loss.backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    ...         record = monitor.step(loss)
    >>> record["step"], len(record["layers"]["ScaledAttention"]["max_logit"])
    (2, 4)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 50,
        file: str | os.PathLike[str] | None = None,
        tensorboard: Any = None,
        log: Log | None = None,
        thresholds: Thresholds | None = None,
        on_alarm: str | Action | None = None,
        reduce: bool = True,
    ) -> None:
        check_bool("reduce", reduce)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every: expected a positive int, got {every!r}")
        if thresholds is not None and not isinstance(thresholds, Thresholds):
            raise TypeError(f"thresholds: expected Thresholds(max_logit=...), got {type(thresholds).__name__}")
        if log is not None and not callable(log):
            raise TypeError(f"log: expected a function of (values, step), got {type(log).__name__}")
        self.model, self.every = model, every
        self.steps = 0  # taken so far; assign to go on with an earlier run's numbers
        self.last: dict[str, Any] | None = None  # the latest record
        self._alarms = Alarms(Thresholds() if thresholds is None else thresholds)
        self._act = _action(on_alarm, model)
        self._reduce = reduce
        if on_alarm is not None and not reduce and rank_and_size()[1] > 1:
            raise ValueError("on_alarm: expected reduce=True, since actions would differ by rank, got reduce=False")
        self._writers: list[Callable[[dict[str, Any]], None]] = []
        self._scalars: _Scalars | None = None
        if self._speaks:
            if file is not None:
                self._writers.append(_json_lines(file))
            if tensorboard is not None:
                self._scalars = _Scalars(tensorboard)
                self._writers.append(_logged(self._scalars.add))
            if log is not None:
                self._writers.append(_logged(log))
        self._watch: Watch | None = None
        self._active = False
        self._not_finite: Tensor | None = None  # bool on the loss's device: one since the last check was not
        self._warned_blind = False

    def __repr__(self) -> str:
        use = "in use" if self._active else "not in use"
        return f"<Monitor {type(self.model).__name__}: every={self.every}, {self.steps} steps taken, {use}>"

    def __enter__(self) -> Monitor:
        if self._active:
            raise RuntimeError("Monitor: expected one that is not in use, got one inside its with block")
        self._begin()
        self._active = True
        return self

    def __exit__(self, *_: object) -> None:
        self._active = False
        self._end()
        if self._scalars is not None:
            self._scalars.close()

    @property
    def _joins(self) -> bool:
        """True where the statistics of several ranks are joined."""
        return self._reduce and rank_and_size()[1] > 1

    @property
    def _speaks(self) -> bool:
        """True where this process writes and warns."""
        return not self._joins or rank_and_size()[0] == 0

    @property
    def active(self) -> bool:
        """True inside the with block."""
        return self._active

    def step(self, loss: float | Tensor | None = None, *, grad_scale: float = 1.0) -> dict[str, Any] | None:
        """End a step, after backward, and before or after optimizer.step().

        Args:
            loss: The step's loss, for the record. One that is not finite raises an alarm in any step; a GPU tensor
                raises it in the next watched step.
            grad_scale: The factor of the gradients: `scaler.get_scale()` before `scaler.update()`.

        Returns:
            The record of a watched step; None otherwise.
        """
        if not self._active:
            raise RuntimeError("Monitor.step: expected to be inside `with monitor:`, got a Monitor that is not in use")
        loss = _checked_loss(loss)
        watch, step = self._watch, self.steps
        self._end()
        self.steps = step + 1
        if loss is None and watch is not None:
            loss = watch.loss()
        loss, alarms = self._loss_and_alarms(step, loss, watch is not None)
        layers = {} if watch is None else self._layers(watch, grad_scale)
        if watch is not None and not layers:
            self._warn_blind(step)
        alarms += self._alarms.of(step, layers)
        if watch is not None or alarms:
            self._record(step, loss, alarms, layers)
        if self._active:
            self._begin()
        return self.last if watch is not None else None

    def callback(self) -> Any:
        """Make a callback for transformers' Trainer: `Trainer(..., callbacks=[monitor.callback()])`.

        It begins and ends with the training. Records have the loss of the model's outputs and the trainer's number of
        the step. `with monitor: trainer.train()` leaves the model whole after an exception too.
        """
        from .trainer import MonitorCallback

        return MonitorCallback(self)

    def restart(self, step: int) -> None:
        """Begin the step of that number, and drop the step that has begun."""
        self._end()
        self.steps = step
        self._begin()

    def _begin(self) -> None:
        if self.steps % self.every == 0:
            self._watch = Watch(self.model)
            _untraced(self._watch.__enter__)()

    def _end(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            _untraced(watch.__exit__)()

    def _loss_and_alarms(
        self, step: int, loss: float | Tensor | None, watched: bool
    ) -> tuple[float | None, list[Alarm]]:
        """The loss and its alarm. Watched steps alone read a loss on a GPU or of several ranks, for all steps since."""
        failed = False
        if self._joins or _is_elsewhere(loss):
            if loss is not None:
                bad = ~torch.isfinite(torch.as_tensor(loss)).all()
                self._not_finite = bad if self._not_finite is None else self._not_finite | bad
            if not watched:
                return None, []
            failed, self._not_finite = bool(self._not_finite), None
        value = None if loss is None else float(loss)
        if self._joins:
            value, failed = joined_losses(step, value, failed)
        if value is None:
            return None, []
        return value, self._alarms.of_loss(step, math.nan if failed and math.isfinite(value) else value)

    def _layers(self, watch: Watch, grad_scale: float) -> dict[str, Any]:
        """The summaries of the layers by name."""
        totals = {name: one for name, tally in watch.tallies.items() if (one := tally.totals()) is not None}
        if not self._joins:
            return {name: one.summary(grad_scale) for name, one in totals.items()}
        ranks = totals_over_ranks(totals, next(self.model.parameters(), torch.empty(0)).device)
        return {name: one.summary(grad_scale * averaged) for name, (one, averaged) in ranks.items()}

    def _record(self, step: int, loss: float | None, alarms: list[Alarm], layers: dict[str, Any]) -> None:
        """Keep and write the record of a step, and act on its alarms."""
        said = [
            {"layer": one.layer, "measure": one.measure, "value": one.value, "limit": one.limit, "new": one.new}
            for one in alarms
        ]
        self.last = {"step": step, "loss": loss, "alarms": said, "layers": layers}
        for write in self._writers if self._speaks else ():
            try:
                write(self.last)
            except OSError as error:  # a full disk ends no training, in which other ranks would wait for this one
                warnings.warn(f"Monitor: a record was not written: {error}", RuntimeWarning, stacklevel=3)
        if alarms and self._act is not None:
            self._act(alarms)
        if (new := [str(alarm) for alarm in alarms if alarm.new]) and self._speaks:
            warnings.warn(f"step {step}: {'; '.join(new)}", RuntimeWarning, stacklevel=3)

    def _warn_blind(self, step: int) -> None:
        if not self._warned_blind and self._speaks:
            self._warned_blind = True
            warnings.warn(
                f"step {step}: Monitor saw no attention: expected layers that compute it by tritonattn or transformers,"
                " in training mode, got none",
                RuntimeWarning,
                stacklevel=3,
            )


def _untraced(function: Callable[[], Any]) -> Callable[[], Any]:
    """The function as it is, also in a step that torch.compile takes whole: traced code may not set the stance."""
    disable: Any = torch.compiler.disable
    return disable(function)


def _is_elsewhere(loss: float | Tensor | None) -> bool:
    """True where reading a loss would wait for a device."""
    return isinstance(loss, Tensor) and loss.device.type != "cpu"


def _checked_loss(loss: Any) -> float | Tensor | None:
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss.detach()
    if loss is None or (isinstance(loss, (int, float)) and not isinstance(loss, bool)):
        return loss
    got = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise TypeError(f"loss: expected a number, a tensor of one element, or None, got {got}")


def _action(on_alarm: str | Action | None, model: nn.Module) -> Action | None:
    if on_alarm is None or callable(on_alarm):
        return on_alarm
    if on_alarm != "undo":
        raise ValueError(f"on_alarm: expected 'undo', a function of alarms, or None, got {on_alarm!r}")
    patched = None
    if "transformers" in sys.modules:
        from ..huggingface import patched as patch_of

        patched = patch_of(model)
    if patched is None:
        raise ValueError(
            f"on_alarm: expected a patched model for 'undo', got a {type(model).__name__} that is not patched"
        )
    return lambda alarms: patched.undo()


def _json_lines(file: str | os.PathLike[str]) -> Callable[[dict[str, Any]], None]:
    """Append a record as a line, by one write: whenever a run ends, its lines are whole."""
    path = Path(file)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"file: expected a file in an existing folder, got {str(file)!r}")
    append(path, [])  # the file exists, and can be written, before the run begins
    return lambda record: append(path, [record])


def _logged(log: Log) -> Callable[[dict[str, Any]], None]:
    """Log a record as named numbers: the loss, and of every layer the largest logit and the heads' means."""

    def write(record: dict[str, Any]) -> None:
        values = {} if record["loss"] is None else {"loss": record["loss"]}
        for layer, measures in record["layers"].items():
            for name, heads in measures.items():
                value = layer_value(name, heads) if isinstance(heads, list) else None
                if value is not None:
                    values[f"{layer}/{name}"] = value
        log(values, record["step"])

    return write


class _Scalars:
    """TensorBoard scalars: a writer of the caller's, or ours for a folder."""

    def __init__(self, target: Any) -> None:
        self._owned = not hasattr(target, "add_scalar")
        self._writer = _writer(target) if self._owned else target

    def add(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Close a writer of ours; flush the caller's, if it can be."""
        if self._owned:
            self._writer.close()
        elif hasattr(self._writer, "flush"):
            self._writer.flush()


def _writer(folder: str | os.PathLike[str]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(f"tensorboard: it is not installed; to mend it: {install('monitor')}") from error
    return SummaryWriter(str(folder))
