"""Warnings at steps of optimizers, such as of layers without the parameters that were added to these layers."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

Added = Callable[[Any], Iterable[nn.Parameter]]


class Awaited(Protocol):
    """What waits for steps of optimizers: it is asked before each one, until there is nothing to wait for."""

    def is_settled(self, optimizer: Optimizer) -> bool: ...


class _AddedParameters:
    """Layers, with the parameters added to them, until an optimizer has stepped these, or one has come round twice."""

    def __init__(self, layers: Iterable[nn.Module], added: Added) -> None:
        self._layers, self._added = [weakref.ref(layer) for layer in layers], added
        self._seen: set[int] = set()

    def is_settled(self, optimizer: Optimizer) -> bool:
        """True where there is nothing to wait for after this step; warns if the parameters were left out."""
        layers = [layer for ref in self._layers if (layer := ref()) is not None]
        added = {id(x) for layer in layers for x in self._added(layer) if x.requires_grad}
        stepped = {id(x) for group in optimizer.param_groups for x in group["params"]}
        if not added or not added.isdisjoint(stepped):
            return True
        if stepped.isdisjoint(id(x) for layer in layers for x in layer.parameters()):
            return False  # one of another model, or of other layers
        is_second = id(optimizer) in self._seen
        self._seen.add(id(optimizer))
        if is_second:
            warnings.warn(
                f"optimizer: expected the parameters that a patch has added to attention layers, got a"
                f" {type(optimizer).__name__} of those before, so that the learned scalings never change: make it after"
                " the patch, or add them by optimizer.add_param_group",
                stacklevel=4,
            )
        return is_second


_awaited: list[Awaited] = []
_hooks: list[Any] = []  # one, from the first use on


def await_steps(awaited: Awaited) -> None:
    """Ask `awaited` before the steps of all optimizers, until it is settled."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_note_step))
    _awaited.append(awaited)


def expect_steps(layers: Iterable[nn.Module], added: Added) -> None:
    """Warn once if optimizers go on to step these layers without the parameters that `added` gives of each.

    Parameters that want no gradient, and layers that are gone, are not waited for.
    """
    await_steps(_AddedParameters(layers, added))


def _note_step(optimizer: Optimizer, *_: Any) -> None:
    """A hook of torch, called before every step of every optimizer."""
    if _awaited and not torch.compiler.is_compiling():
        _awaited[:] = [one for one in _awaited if not one.is_settled(optimizer)]
