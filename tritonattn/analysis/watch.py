"""Collecting the attention calls of a model's layers for a while."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.observation import ObservedCall, Observer
from ..core.private_names import private
from ..core.torch_distributed import head_part
from .tally import Tally

_current_graph_task_id = private("torch._C._current_graph_task_id", lambda: -1)

if TYPE_CHECKING:
    from typing_extensions import Self


class _Hook:
    """A hook of one model, which a copy of the model has without a function: there it does nothing."""

    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if self._function is not None:
            self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:  # also for copy.deepcopy
        return _Hook, ()


class _Running(threading.local):
    """The modules whose forward runs in this thread, outermost first, with their names."""

    def __init__(self) -> None:
        self.modules: list[tuple[str, nn.Module]] = []


class _Uncompiled:
    """Contexts in which code that torch.compile has compiled, or would, runs as it was written.

    The compiler's stance holds for the whole process, and watches of several models overlap in any order: the first
    sets it, and the last restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = 0
        self._stance: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._open:
                self._stance = torch.compiler.set_stance("force_eager")
            self._open += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._open -= 1
            if not self._open:
                self._stance.__exit__(None, None, None)


_uncompiled = _Uncompiled()


class Calls:
    """A context in which every attention that a model computes is handed to a function, with the module's name.

    These are calls of `tritonattn.attention` and `attention_varlen` by the model's modules, patched transformers layers
    among them, and transformers layers that use "eager" or "sdpa" attention. No number of the model changes.

    Calls are seen while a module of the model runs, in the thread that runs it. This includes autograd's threads, which
    run checkpointed layers again, and those of nn.DataParallel, and excludes other models. Compiled code runs
    uncompiled, in all threads: a compiler would neither call an observer nor keep its graphs with the hooks.
    """

    def __init__(self, model: nn.Module, each: Callable[[str, nn.Module, ObservedCall], None]) -> None:
        self._model = model
        self._running = _Running()
        self._observer = Observer(lambda call: each(*self._running.modules[-1], call))
        self._contexts = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as contexts:
            contexts.enter_context(_uncompiled)
            for context in _contexts_of(self._model):
                contexts.enter_context(context)
            contexts.callback(self._observer.close)
            for name, module in self._model.named_modules():
                enter = partial(self._enter, name or type(module).__name__)
                contexts.callback(module.register_forward_pre_hook(_Hook(enter)).remove)
                contexts.callback(module.register_forward_hook(_Hook(self._leave), always_call=True).remove)
            self._contexts = contexts.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._contexts.close()

    def _enter(self, name: str, module: nn.Module, _: Any) -> None:
        if not self._running.modules:
            self._observer.begin()
        self._running.modules.append((name, module))

    def _leave(self, module: nn.Module, *_: Any) -> None:
        modules = self._running.modules
        if any(other is module for _, other in modules):  # one that raised may be left twice
            while modules.pop()[1] is not module:
                pass
            if not modules:
                self._observer.end()


class Watch(Calls):
    """A context in which the calls of a model are counted, by the module that computes them.

    A module counts in training mode, or if its result has a graph, so evaluation under torch.no_grad() does not.
    The second forward of a checkpointed layer, inside backward, does not count again.

    tallies   by the module's name
    losses    of those outputs of the model that have one
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, self._count)
        self.tallies: dict[str, Tally] = {}
        self.losses: list[Tensor] = []
        self.losses_add_up = False

    def __enter__(self) -> Self:
        super().__enter__()
        self._contexts.callback(self._model.register_forward_hook(_Hook(self._take_loss), with_kwargs=True).remove)
        return self

    def _take_loss(self, module: nn.Module, _: Any, keywords: dict[str, Any], out: Any) -> None:
        loss = getattr(out, "loss", None)
        if module.training and isinstance(loss, Tensor) and loss.numel() == 1:
            self.losses.append(loss.detach().reshape(()))
            self.losses_add_up = keywords.get("num_items_in_batch") is not None

    def _count(self, name: str, module: nn.Module, call: ObservedCall) -> None:
        if not (module.training or call.out.requires_grad):
            return
        if name not in self.tallies:
            self.tallies.setdefault(name, Tally(head_part(module)))  # at once: threads share a layer
        tally = self.tallies[name]
        tally.follow_gradients(call)
        if not _in_backward():
            tally.add(call)

    def loss(self) -> float | None:
        """The loss of the model's outputs: their mean, or their sum if the model was given num_items_in_batch."""
        if not self.losses:
            return None
        losses = torch.stack([loss.double().cpu() for loss in self.losses])
        return float(losses.sum() if self.losses_add_up else losses.mean())


def _contexts_of(model: nn.Module) -> list[Any]:
    if "transformers" not in sys.modules:  # then no model is one of transformers
        return []
    from ..huggingface.observed import observable, unpatched_attention

    return [observable(unpatched_attention(model))]


def _in_backward() -> bool:
    return _current_graph_task_id() != -1
