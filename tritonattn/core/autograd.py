"""Shared by the package's autograd functions: when to skip torch's dispatcher, autocast, first-order gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

_PLAIN = (Tensor, torch.nn.Parameter)


def runs_eagerly(*tensors: Tensor | None) -> bool:
    """True where these are real tensors outside of any compiler, transform, dispatch mode or subclass.

    An implementation can then be called directly, and values of CPU tensors can be read. Otherwise a call must go
    through an operator that torch can see. A tensor whose memory holds the negatives of its values is not real either,
    nor is a batch of torch.autograd.grad.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._len_torch_dispatch_stack() > 0:
        return False
    for tensor in tensors:  # no generator: a tiny call asks a dozen times
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_neg() or is_legacy_batchedtensor(tensor)):
            return False
    return True


def values_are_read(*tensors: Tensor | None) -> bool:
    """True where the host reads values of tensors: on a CPU, unless a compiler or a transform stands between."""
    for x in tensors:  # no generator: every decode step asks
        if x is not None and (x.device.type != "cpu" or x.numel() == 0):
            return False
    return runs_eagerly(*tensors)


def is_transformed() -> bool:
    """True where a call runs under torch.func (vmap, grad ...), not counting what a compiler traces."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def needs_graph(*tensors: Tensor | None) -> bool:
    """True where a result of these must carry a derivative: backward, or forward mode, which is refused."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def refuse_tangents(backend: str, names: Iterable[str], tensors: Iterable[Tensor | None]) -> None:
    """Raise where a tensor carries a tangent of forward mode, which no autograd function of this package passes on.

    They have no jvp that would say so, since torch.compile refuses functions with one.
    """
    for name, x in zip(names, tensors, strict=True):
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{name}: expected no tangent with backend {backend!r}, got one: forward-mode derivatives (jvp) are not"
                ' supported; backend="reference" has them'
            )


def autocast_is_on(tensor: Tensor) -> bool:
    """True where torch.autocast acts on operators of this tensor's device; it knows no meta device."""
    device = tensor.device.type
    is_known = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return is_known and torch.is_autocast_enabled(device)


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Operators on this tensor's device keep the dtypes of their operands."""
    return torch.autocast(tensor.device.type, enabled=False) if autocast_is_on(tensor) else nullcontext()


def apply(function: type[Function], *arguments: Any) -> Any:
    """function.apply(*arguments), by shorter ways for real tensors: without a graph only its forward runs."""
    tensors = []
    for argument in arguments:  # no comprehension: each is one more call before Python 3.12
        if isinstance(argument, Tensor):
            tensors.append(argument)
    if not runs_eagerly(*tensors):
        return function.apply(*arguments)
    if not needs_graph(*tensors):
        return function.forward(*arguments)
    return apply_with_graph(function, *arguments)


def apply_with_graph(function: type[Function], *arguments: Any) -> Any:
    """function.apply(*arguments) for tensors that `runs_eagerly` takes.

    The Python part of Function.apply serves transforms; its inspect.signature takes longer than the rest of autograd.
    """
    past_it: Any = super(Function, function)
    return past_it.apply(*arguments)


def first_order(backward: Callable) -> Callable:
    """Decorator of backward(ctx, saved_tensors, *gradients): a gradient of its gradients raises RuntimeError.

    torch's once_differentiable silently returns zeros under torch.func.grad(torch.func.grad(f)). The saved tensors
    are an argument because checkpointing allows one access.
    """

    @functools.wraps(backward)
    def refusing(ctx, *gradients):
        saved = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return backward(ctx, saved, *gradients)
        with torch.no_grad():
            result = backward(ctx, saved, *gradients)
        if torch.compiler.is_compiling():
            return result
        return _refused(result if isinstance(result, tuple) else (result,), (*saved, *gradients))

    return refusing


def refuse_second_order(x: Tensor) -> None:
    """Let a gradient of the gradients of a result of one of torch's operators raise the error of `first_order`.

    Only for real tensors: compilers and transforms meet the operators of this package, whose backward refuses.
    """
    if runs_eagerly(x) and (node := x.grad_fn) is not None:
        node.register_hook(_refuse_where_recorded)


def _refuse_where_recorded(results: tuple[Tensor | None, ...], gradients: tuple[Tensor | None, ...]) -> Any:
    return _refused(results, gradients) if torch.is_grad_enabled() else None


def _refused(results: tuple[Tensor | None, ...], others: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    given = tuple(x for x in results if x is not None)
    refused = iter(_Refuse.apply(len(given), *given, *others))
    return tuple(None if x is None else next(refused) for x in results)


class _Refuse(Function):
    """Return the first `count` tensors unchanged; their derivatives towards all tensors raise."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Any) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError('tritonattn: gradients of gradients are not supported; backend="reference" has them')
