"""Shared by the package's autograd functions: when to skip torch's dispatcher, autocast, derivatives of derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from .private_names import private

is_legacy_batchedtensor = private("torch._C._functorch.is_legacy_batchedtensor")
transforms_are_active = private("torch._C._are_functorch_transforms_active")
_len_torch_dispatch_stack = private("torch._C._len_torch_dispatch_stack")
_set_fwd_grad_enabled = private("torch.autograd.forward_ad._set_fwd_grad_enabled")
private("torch.autograd.forward_ad._current_level")  # a number that torch assigns anew: read where it stands

_PLAIN = (Tensor, torch.nn.Parameter)


def runs_eagerly(*tensors: Tensor | None) -> bool:
    """True where these are real tensors outside of any compiler, transform, dispatch mode or subclass.

    An implementation can then be called directly, and values of CPU tensors can be read. Otherwise a call must go
    through an operator that torch can see. A tensor whose memory holds the negatives of its values is not real either,
    nor is a batch of torch.autograd.grad.
    """
    if torch.compiler.is_compiling() or transforms_are_active():
        return False
    if _len_torch_dispatch_stack() > 0:
        return False
    for tensor in tensors:  # no generator: a tiny call asks a dozen times
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_neg() or is_legacy_batchedtensor(tensor)):
            return False
    return True


def values_are_read(*tensors: Tensor | None, waits: bool = False) -> bool:
    """True where the host reads values of tensors, unless a compiler or a transform stands between.

    waits   of tensors on any device, which it waits for: else on a CPU alone
    """
    for x in tensors:  # no generator: every decode step asks
        if x is not None and ((x.device.type != "cpu" and not waits) or x.numel() == 0):
            return False
    return runs_eagerly(*tensors)


def kept(make: Callable[..., Tensor], device: torch.device, *numbers: Any) -> Tensor:
    """make(device, *numbers), read-only; outside of compilers and transforms it is kept for later calls.

    One that was written to, as by a user's scaling, is made again. Memory of a captured graph is the graph's, so that a
    capture neither keeps a tensor nor uses a kept one.
    """
    is_on_gpu = device.type == "cuda"
    if not runs_eagerly() or (is_on_gpu and torch.cuda.is_current_stream_capturing()):
        return make(device, *numbers)
    stream = torch.cuda.current_stream(device) if is_on_gpu else None
    found, version = _kept(make, device, numbers, stream)
    if found._version != version:
        _kept.cache_clear()
        found, _ = _kept(make, device, numbers, stream)
    return found


@functools.lru_cache(maxsize=32)
def _kept(make: Callable[..., Tensor], device: torch.device, numbers: tuple, stream: Any) -> tuple[Tensor, int]:
    """A tensor that belongs to one stream, which orders its writes and reads, and its version, for inference too."""
    with torch.inference_mode(False):  # its tensors have no version, and no graph may save them
        made = make(device, *numbers)
    return made, made._version


class Facts:
    """Tensors, tuples of them and other facts by name, read-only; those that were written to are made again."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, list[int]]] = {}

    def of(self, name: str, compute: Callable[[], Any]) -> Any:
        """compute(), or what an earlier one has found."""
        found, versions = self._kept.get(name, (None, None))
        if versions is None or versions != _versions(found):
            with torch.inference_mode(False):
                found = compute()
            self._kept[name] = found, _versions(found)
        return found


def _versions(found: Any) -> list[int]:
    versions = []
    for x in found if isinstance(found, tuple) else (found,):  # no comprehension: every decode step asks
        if isinstance(x, Tensor):
            versions.append(x._version)
    return versions


@functools.lru_cache(maxsize=64)
def facts_of(*layout: Any) -> Facts:
    """The facts of a layout of tokens, which numbers and tuples of them tell: for layers of a model, and backwards."""
    return Facts()


def is_transformed() -> bool:
    """True where a call runs under torch.func (vmap, grad ...), not counting what a compiler traces."""
    return not torch.compiler.is_compiling() and transforms_are_active()


def needs_graph(*tensors: Tensor | None) -> bool:
    """True where a result of these must carry a derivative: backward, or forward mode."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def in_forward_mode() -> bool:
    """True inside of torch.func.jvp, or of a level of dual numbers."""
    return forward_ad._current_level >= 0


def primal_of(x: Tensor | None) -> Tensor | None:
    """x without its tangent, with its graph, in a jvp. Under torch.func, x has none there."""
    if x is None or transforms_are_active():
        return x
    with _set_fwd_grad_enabled(True):  # torch switches it off for a jvp
        return forward_ad.unpack_dual(x).primal


def autocast_is_on(tensor: Tensor) -> bool:
    """True where torch.autocast acts on operators of this tensor's device; it knows no meta device."""
    device = tensor.device.type
    is_known = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return is_known and torch.is_autocast_enabled(device)


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Operators on this tensor's device keep the dtypes of their operands."""
    return torch.autocast(tensor.device.type, enabled=False) if autocast_is_on(tensor) else nullcontext()


def apply(function: type[Function], *arguments: Any) -> Any:
    """function.apply(*arguments), by shorter ways for real tensors: without a graph only its forward runs.

    A function's `tangent` is what torch calls its jvp. In a backward, `apply` of another function makes its gradients
    differentiable again.
    """
    tensors = []
    for argument in arguments:  # no comprehension: each is one more call before Python 3.12
        if isinstance(argument, Tensor):
            tensors.append(argument)
    if torch.compiler.is_compiling():  # without a graph Dynamo hands a context to a forward of any number of arguments
        return function.apply(*arguments) if needs_graph(*tensors) else function.forward(*arguments)
    if not runs_eagerly(*tensors):
        return (with_jvp(function) if in_forward_mode() else function).apply(*arguments)
    if not needs_graph(*tensors):
        return function.forward(*arguments)
    return apply_with_graph(function, *arguments)


def apply_with_graph(function: type[Function], *arguments: Any) -> Any:
    """function.apply(*arguments) for tensors that `runs_eagerly` takes.

    The Python part of Function.apply serves transforms; its inspect.signature takes longer than the rest of autograd.
    """
    past_it: Any = super(Function, with_jvp(function) if forward_ad._current_level >= 0 else function)
    return past_it.apply(*arguments)


@functools.cache
def with_jvp(function: type[Function]) -> Any:
    """The function for forward mode: its `tangent` is torch's jvp, for which torch.compile refuses a function."""

    def forward(*arguments: Any) -> Any:
        results = function.forward(*arguments)
        return tuple(map(_owned, results)) if isinstance(results, tuple) else _owned(results)

    methods = {"forward": forward, "jvp": getattr(function, "tangent", _no_tangent)}
    return type(function.__name__, (function,), {name: staticmethod(method) for name, method in methods.items()})


def _owned(x: Any) -> Any:
    """x with memory of its own: torch refuses a tangent of a view that is laid out otherwise."""
    return x.clone() if isinstance(x, Tensor) and x._is_view() else x


def _no_tangent(ctx: Any, *tangents: Tensor | None) -> Any:
    raise NotImplementedError('tritonattn: no forward-mode derivatives (jvp) here; backend="reference" has them')


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for the backward of a function and, where it may be called, for its `tangent`."""
    ctx.save_for_backward(*tensors)
    if forward_ad._current_level >= 0 and not torch.compiler.is_compiling():
        ctx.save_for_forward(*tensors)


def apply_in_backward(function: type[Function], *arguments: Any) -> Any:
    """`apply` of a function by which a backward, or a tangent, is differentiable again where that may be asked for."""
    return apply(function, *arguments) if differentiates_again() else function.forward(*arguments)


def differentiates_again() -> bool:
    """True where the result of a backward may be differentiated."""
    return (torch.is_grad_enabled() or forward_ad._current_level >= 0) and not torch.compiler.is_compiling()


def gradients_again(
    attend: Callable[..., Tensor], operands: Sequence[Tensor], needs: Sequence[bool], d_out: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of a function of operands that are asked for, with derivatives of their own."""
    # Each as a node of its own: q may be a function of k.
    operands = [x.view_as(x) for x in operands]
    asked = [x for x, need in zip(operands, needs, strict=False) if need]
    found = iter(torch.autograd.grad(attend(*operands), asked, d_out, create_graph=True))
    return tuple([next(found) if need else None for need in needs])


class Linear:
    """A map of a tensor x, linear in x, and its transpose; others are tensors without derivatives, or None."""

    def there(self, x: Tensor, *others: Any) -> Tensor:
        raise NotImplementedError

    def back(self, x: Tensor, *others: Any) -> Tensor:
        raise NotImplementedError

    def __call__(self, x: Tensor, *others: Tensor | None) -> Tensor:
        """The image of x, with derivatives of every order."""
        return apply(_Linear, x, self, True, *others)


class _Linear(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, linear, is_there, *others) -> Tensor:
        return linear.there(x, *others) if is_there else linear.back(x, *others)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, ctx.linear, ctx.is_there, *others = inputs
        save(ctx, *others)

    @staticmethod
    def backward(ctx, g: Tensor):
        others = ctx.saved_tensors
        return apply_in_backward(_Linear, g, ctx.linear, not ctx.is_there, *others), None, None, *[None] * len(others)

    @staticmethod
    def tangent(ctx, x: Tensor, *none):
        return apply_in_backward(_Linear, x, ctx.linear, ctx.is_there, *ctx.saved_tensors)


def first_order(what: str) -> Callable[[Callable], Callable]:
    """Decorator of backward(ctx, saved_tensors, *gradients) of `what`: a gradient of its gradients raises.

    torch's once_differentiable silently returns zeros under torch.func.grad(torch.func.grad(f)). The saved tensors
    are an argument because checkpointing allows one access.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def refusing(ctx, *gradients):
            saved = ctx.saved_tensors
            if not torch.is_grad_enabled():
                return backward(ctx, saved, *gradients)
            with torch.no_grad():
                result = backward(ctx, saved, *gradients)
            if torch.compiler.is_compiling():
                return result
            return refused(
                no_second_order(what), result if isinstance(result, tuple) else (result,), (*saved, *gradients)
            )

        return refusing

    return decorate


def no_second_order(what: str) -> str:
    return f"{what} has no gradients of gradients; backends 'triton', 'sdpa' and 'reference' have them"


def refused(
    why: str, results: tuple[Tensor | None, ...], others: tuple[Tensor | None, ...] = ()
) -> tuple[Tensor | None, ...]:
    """The results as they are, but that a derivative of them, towards them or others, raises."""
    given = tuple([x for x in results if x is not None])
    marked = iter(apply(_Refuse, why, len(given), *given, *others))
    return tuple([None if x is None else next(marked) for x in results])


class _Refuse(Function):
    """Return the first `count` tensors unchanged; their derivatives towards all tensors raise."""

    generate_vmap_rule = True

    @staticmethod
    def forward(why: str, count: int, *tensors: Any) -> tuple[Tensor, ...]:
        return tuple([tensor.view_as(tensor) for tensor in tensors[:count]])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.why, *_ = inputs

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError(f"tritonattn: {ctx.why}")

    tangent = backward
