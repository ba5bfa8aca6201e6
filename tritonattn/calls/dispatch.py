"""Run the checked arguments of a public call on a backend, and return its results."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .. import ops
from ..backends import reference
from ..backends.cpu import sdpa
from ..core.autograd import autocast_is_on, is_compiled_transform, is_transformed, needs_graph
from ..core.call import AttentionCall, ForwardResult, Logits
from ..core.dropout import Dropout
from ..core.observation import ObservedCall, is_observed, notify_observers
from ..core.statistics import Statistics
from ..core.visibility import Visibility
from .checks import Options
from .factor import Factor, scale_dtype

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_LARGEST_KERNEL_DIM = 512
_LARGEST_KEY_OF_DECODE = 1024
_DIM_OF_EVERY_GPU = 256
_AS_IT_IS = nullcontext()


class AttentionAux(NamedTuple):
    """The softmax of each row before dropout and sinks: [B, Hq, Sq], fp32 (fp64 for fp64 q), natural log.

    lse         ln sum_j exp(logit[i, j]) over the visible keys, after softcap; differentiable
    max_logit   max_j logit[i, j], before softcap; not differentiable
    entropy     -sum_j p[i, j] ln p[i, j], after softcap; not differentiable

    A row without keys has lse = max_logit = -inf and entropy 0.

    >>> import torch, tritonattn
    >>> q, k, v = torch.randn(3, 1, 4, 16, 8)
    >>> out, aux = tritonattn.attention(q, k, v, causal=True, return_aux=True)
    >>> aux.entropy[0, :, 0].tolist()  # the first row sees one key
    [0.0, 0.0, 0.0, 0.0]
    """

    lse: Tensor
    max_logit: Tensor
    entropy: Tensor


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], AbstractContextManager]:
    """q, k, v in the dtype of torch.autocast where it is on, and a context in which it is off.

    float64 stays, as in torch's own operators. Attention computes in the dtypes of its operands from there on.
    """
    if not isinstance(q, Tensor) or not autocast_is_on(q):
        return (q, k, v), _AS_IT_IS
    device = q.device.type
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:
        eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if eligible else x

    return (cast(q), cast(k), cast(v)), torch.autocast(device, enabled=False)


def attend(
    q: Tensor, k: Tensor, v: Tensor, factor: Factor, visibility: Visibility, options: Options
) -> Tensor | tuple[Tensor, AttentionAux]:
    """Attention of checked operands [B, H, S, D] on the backend that `options` asks for, with autocast off."""
    if is_compiled_transform():
        # Dynamo's own rules for autograd functions in torch.func.grad gave wrong gradients. Raising leaves the call
        # uncompiled; fullgraph=True hands the error on.
        raise RuntimeError("tritonattn: a torch.func transform of attention is not compiled")
    result = _attend(q, k, v, factor, visibility, options)
    if is_observed():

        def aux() -> AttentionAux:
            again, bias = options._replace(return_aux=True, dropout_p=0.0), options.key_bias
            with torch.no_grad():
                found = _aux(q, k, factor, visibility, again)
                if bias is None:
                    return found
                # A bias may grow with the position, as of forget gates: without it logits tell how large q . k is.
                only_hides = again._replace(key_bias=torch.where(bias == -torch.inf, bias, 0))
                return found._replace(max_logit=_aux(q, k, factor, visibility, only_hides).max_logit)

        out = result[0] if isinstance(result, tuple) else result
        notify_observers(ObservedCall(q, k, out, visibility, options.softcap, aux))
    return result


def _aux(q: Tensor, k: Tensor, factor: Factor, visibility: Visibility, options: Options) -> AttentionAux:
    narrow = k.detach()[..., :1]  # stands for v; its values reach nothing that is read
    return cast(tuple[Tensor, AttentionAux], _attend(q, k, narrow, factor, visibility, options))[1]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, factor: Factor, visibility: Visibility, options: Options
) -> Tensor | tuple[Tensor, AttentionAux]:
    backend = choose_backend(q, k, v, options)
    if backend != "triton" and q.dtype.itemsize == 2 and (is_transformed() or needs_graph(q, k)):
        q, k = q.float(), k.float()  # gradients of logits and of norms add up before they are rounded
    dropout = Dropout.draw(options.dropout_p, q.device) if options.dropout_p > 0 else None
    sinks = sinks_of(q, options)
    if backend == "reference":
        multiplier, bias = factor.dense(q, k, visibility, options.key_bias)
        result = reference.attention(
            q,
            k,
            v,
            multiplier,
            visibility,
            bias=bias,
            softcap=options.cap,
            sinks=sinks,
            dropout=dropout,
        )
        result = result._replace(out=result.out.to(v.dtype))
    else:
        statistics = (ops.KernelStatistics if backend == "triton" else Statistics)(k, visibility)
        logits = factor.logits(q, k, visibility, statistics, options.key_bias, options.cap, sinks)
        if visibility.invariant and backend == "triton":
            _refuse_scaled_halves(v, logits, q, k)
        call = statistics.widened(AttentionCall(q, k, v, visibility, logits, dropout))
        if not options.return_aux:
            return _out(call, backend)
        result = ops.attention(call, backend, aux=True)
    if not options.return_aux:
        return result.out
    return result.out, aux_of(result)


def sinks_of(q: Tensor, options: Options) -> Tensor | None:
    """The sinks of a call in the dtype in which they act."""
    return None if options.sinks is None else options.sinks.to(scale_dtype(q))


def aux_of(result: ForwardResult) -> AttentionAux:
    """The `AttentionAux` of a result that was computed with aux."""
    assert result.max_logit is not None
    assert result.entropy is not None
    return AttentionAux(result.lse, result.max_logit, result.entropy)


def _out(call: AttentionCall, backend: str) -> Tensor:
    # torch maps its own attention in a loop under vmap; our operators fold the mapped axis into the batch.
    if backend == "sdpa" and not (is_transformed() or call.invariant) and sdpa.supports(call):
        return sdpa.attention(call)
    return ops.attention(call, backend, aux=False).out


def choose_backend(q: Tensor, k: Tensor, v: Tensor, options: Options, decodes: bool = False) -> str:
    """Choose the backend of a call: the one asked for, which must support the call, or for "auto" one that does.

    decodes   only the decode kernel will run, which takes wider keys
    """
    backend = _choose_backend(q, k, v, options, decodes)
    if options.invariant:
        _refuse_company(q, k, backend, options)
    return backend


def _refuse_company(q: Tensor, k: Tensor, backend: str, options: Options) -> None:
    """Raise where a row's bits would depend on its company although `batch_invariant` is on."""
    obstacle = None
    if options.dropout_p > 0:
        obstacle = "dropout_p above 0, whose bits follow the place in the batch"
    elif backend == "reference":
        obstacle = "backend 'reference', whose products follow the lengths"
    elif backend == "sdpa" and q.device.type == "cuda":
        obstacle = f"backend 'sdpa' on {q.device}, whose products follow the lengths"
    if obstacle is not None:
        raise NotImplementedError(f"batch_invariant: not supported with {obstacle}")


def _refuse_scaled_halves(v: Tensor, logits: Logits, *operands: Tensor) -> None:
    """Raise for gradients of fp16 with scales: kernels divide by the largest scale of a head before they round."""
    is_scaled = logits.query_scale is not None or logits.key_scale is not None
    if v.dtype == torch.float16 and is_scaled and needs_graph(*operands, v, logits.query_scale, logits.key_scale):
        raise NotImplementedError(
            "batch_invariant: not supported with gradients of float16 through a scaling with vectors: kernels divide"
            " these by a head's largest entry before they round; use bfloat16 or float32"
        )


def _choose_backend(q: Tensor, k: Tensor, v: Tensor, options: Options, decodes: bool) -> str:
    asked = options.backend
    if asked == "triton" and (obstacle := _kernel_obstacle(q, v, decodes)):
        raise NotImplementedError(
            f"{obstacle}: backend 'triton' does not support it; backends 'sdpa' and 'reference' do"
        )
    if q.numel() == 0 or k.numel() == 0:
        return "sdpa"  # nothing to compute
    if asked in ("sdpa", "reference"):
        return asked
    if asked == "auto":
        if q.device.type != "cuda":
            return "sdpa"
        if obstacle := _kernel_obstacle(q, v, decodes) or (not _HAS_TRITON and "triton is not installed"):
            _warn_once(f"tritonattn: backend 'sdpa' instead of 'triton': {obstacle}")
            return "sdpa"
        return "triton"
    if not _HAS_TRITON:
        raise ImportError(
            "backend: 'triton' needs the package triton, which is not installed: pip install 'triton>=3.4'"
            " (Linux); backends 'sdpa' and 'reference' do without"
        )
    _check_kernels_run_on(q.device)
    return "triton"


def kernels_take(x: Tensor) -> bool:
    """Whether "auto" runs kernels on x [B, H, S, D]."""
    return x.device.type == "cuda" and _HAS_TRITON and _kernel_obstacle(x, x) is None


def _kernel_obstacle(q: Tensor, v: Tensor, decodes: bool = False) -> str | None:
    """Name the property of a call that kernels cannot honour, or None."""
    if q.dtype == torch.float64:
        return "q of dtype torch.float64"
    if q.device.type == "cuda" and _HAS_TRITON and (obstacle := _obstacle_of_card(q.device)):
        return obstacle
    head_dim, value_dim = q.shape[3], v.shape[3]
    if head_dim <= _DIM_OF_EVERY_GPU and value_dim <= _DIM_OF_EVERY_GPU:
        return None
    largest_key = _LARGEST_KEY_OF_DECODE if decodes else _LARGEST_KERNEL_DIM
    for dim, limit in ((head_dim, largest_key), (value_dim, _LARGEST_KERNEL_DIM)):
        if dim > limit:
            return f"head_dim {dim}, above {limit}"
    if q.device.type == "cuda" and _HAS_TRITON:
        return _obstacle_of_memory(head_dim, value_dim, q.dtype, q.device, decodes)
    return None


def _obstacle_of_card(device: torch.device) -> str | None:
    """Say that Triton has no code for a device's tensor cores, or None."""
    return _kept_obstacle_of_card(device)


@functools.cache
def _kept_obstacle_of_card(device: torch.device) -> str | None:
    from ..tuning.config import Target

    if not torch.cuda.is_available():  # tensors of a trace
        return None
    target = Target.of(device)
    return f"{target.name}, for whose tensor cores Triton has no code," if target.is_too_old else None


def _obstacle_of_memory(
    head_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device, decodes: bool
) -> str | None:
    """Name what a device lacks for the kernels at wide heads, or None."""
    from ..tuning.config import TILED_KERNELS, Target
    from ..tuning.defaults import obstacle

    return obstacle(head_dim, value_dim, dtype, Target.of(device), ("decode",) if decodes else TILED_KERNELS)


# The mark of torch.compiler.assume_constant_result, which imports all of torch._dynamo, in a second.
_obstacle_of_card._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
_obstacle_of_memory._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _check_kernels_run_on(device: torch.device) -> None:
    if device.type == "cuda":
        return
    from ..backends.triton.launch import runs_on  # `kernels` is cached by a wrapper that torch.compile warns of

    if not runs_on(device):
        raise ValueError(
            f"backend: expected tensors on a CUDA or HIP device for 'triton', got {device}; kernels run on CPU"
            " tensors only in triton's interpreter, with TRITON_INTERPRET=1 in the environment"
        )


def _warn_once(message: str) -> None:
    if not torch.compiler.is_compiling():
        _warn(message)


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=9)
