"""`attention` and `scaled_attention`: validate, resolve the scaling, choose the backend, dispatch."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops, reference, sdpa
from .autograd import is_transformed
from .call import AttentionCall
from .dropout import Dropout
from .scaling import Scales, Scaling
from .statistics import Statistics
from .validation import (
    Options,
    check,
    check_factor,
    check_multiplier,
    check_number,
    check_tensor,
    named_scaling,
    refuse_scaling,
)
from .visibility import Visibility

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_LARGEST_KERNEL_DIM = 256


class AttentionAux(NamedTuple):
    """The softmax of each row before dropout and sinks: [B, Hq, Sq], fp32 (fp64 for fp64 q), natural log.

    lse         ln sum_j exp(logit[i, j]) over the visible keys, after softcap; differentiable
    max_logit   max_j logit[i, j], before softcap; not differentiable
    entropy     -sum_j p[i, j] ln p[i, j], after softcap; not differentiable

    A row without keys has lse = max_logit = -inf and entropy 0.
    """

    lse: Tensor
    max_logit: Tensor
    entropy: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scaling: str | Scaling | float | Tensor = "sqrt_dim",
    gain: float | Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None,
    key_ranges: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_aux: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, AttentionAux]:
    """Attention whose logit scaling is a parameter.

        logit[i, j] = gain[i] * factor[i, j] * (q[i] . k[j])
        out[i]      = sum_j softmax_j(logit[i, j]) * v[j]          over the keys j visible to row i

    Args:
        q: [B, Hq, Sq, D], float16, bfloat16, float32 or (not in kernels) float64; any strides.
        k: [B, Hkv, Sk, D] in q's dtype. Hkv divides Hq: query head h reads key head h // (Hq / Hkv).
        v: [B, Hkv, Sk, Dv] in q's dtype.
        scaling: The factor: a name in `SCALINGS`, a `Scaling`, a float (the factor itself), or a tensor
            broadcastable to [B, Hq, Sq], which gets a gradient. "sqrt_dim" is 1 / sqrt(D).
        gain: A float, or a tensor broadcastable to [B, Hq, Sq] (one a head: [Hq, 1]), which gets a gradient.
        causal: Row i sees the keys j <= i + Sk - Sq (bottom-right).
        window: (left, right): row i sees i + Sk - Sq - left <= j <= i + Sk - Sq + right; None, -1: no limit.
        key_lengths: Integers [B]: keys at and after it are invisible.
        key_ranges: Integers [B, Sq, 2] or [B, 1, Sq, 2]: row i sees lo <= j < hi of its pair (lo, hi).
        mask: bool, broadcastable to [B, Hq, Sq, Sk], True is visible: for masks with holes; slower.
        softcap: c > 0: logit -> c * tanh(logit / c), after scaling.
        sinks: [Hq]: a logit that joins the softmax's denominator only, neither scaled nor capped; gets a
            gradient.
        dropout_p: Chance in [0, 1) to drop a probability; the others are multiplied by 1 / (1 - dropout_p).
            The bits follow torch.manual_seed and are the same on every backend.
        return_aux: Return (out, `AttentionAux`).
        backend: "auto", "triton" (kernels), "sdpa" (PyTorch) or "reference" (eager, O(Sq Sk)). "auto" runs
            kernels for CUDA and HIP tensors, and PyTorch for others and for what kernels cannot do (it warns
            once).

    causal, window, key_lengths, key_ranges and mask narrow one another. Key lengths and ranges on a GPU are
    clamped to [0, Sk] and never read by the host; on a CPU they are checked.

    Returns:
        [B, Hq, Sq, Dv] in q's dtype. A row that sees no key gives zeros and no gradient. What no row of a
        batch entry may see reaches no result, NaN and inf included. Gradients are of first order.

    Raises:
        TypeError: A type or dtype.
        ValueError: A shape, device, value or name.
        NotImplementedError: An argument that the backend asked for cannot honour.
        ImportError: Backend "triton" without triton.

    Under torch.autocast q, k and v are cast as `F.scaled_dot_product_attention` casts them.

    >>> import torch, tritonattn
    >>> q, k, v = torch.randn(3, 1, 4, 16, 8)
    >>> tritonattn.attention(q, k, v, scaling="key_norm_mean", causal=True).shape
    torch.Size([1, 4, 16, 8])

    Sources: Vaswani et al. 2017, arXiv:1706.03762 (sqrt_dim); Bernhard 2023, arXiv:2311.09406 (key_norm_sum);
    each mode names its own. Dao 2023, arXiv:2307.08691 (the algorithm).
    """
    options = Options(
        causal, window, key_lengths, key_ranges, mask, softcap, sinks, dropout_p, return_aux, backend
    )  # fmt: skip
    q, k, v = _autocast(q, k, v)
    check(q, k, v, options)
    return _attend(q, k, v, _resolve(scaling, q), _checked_gain(gain, q), options)


def scaled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None,
    key_ranges: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_aux: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, AttentionAux]:
    """Attention with the scales themselves: what every scaling comes down to.

        logit[i, j] = scale * (q[i] . k[j]) * query_scale[i] * key_scale[j]

    Args:
        query_scale: Floating, broadcastable to [B, Hq, Sq]; any sign, 0 included; gets a gradient.
        key_scale: Floating, broadcastable to [B, Hkv, Sk], likewise.
        scale: A finite float; None is 1 / sqrt(D).

    The other arguments, the result and the errors are those of `attention`. Scales are float32 (float64 for
    float64 q), whatever their dtype.

    >>> import torch, tritonattn
    >>> q = k = v = torch.randn(1, 2, 5, 8)
    >>> tritonattn.scaled_attention(q, k, v, torch.full((2, 1), 0.5), scale=1.0).shape
    torch.Size([1, 2, 5, 8])
    """
    options = Options(
        causal, window, key_lengths, key_ranges, mask, softcap, sinks, dropout_p, return_aux, backend
    )  # fmt: skip
    q, k, v = _autocast(q, k, v)
    check(q, k, v, options)
    if query_scale is not None:
        check_factor("query_scale", query_scale, q, tuple(q.shape[:3]), "[B, Hq, Sq]")
        query_scale = query_scale.to(_scale_dtype(q))
    if key_scale is not None:
        check_factor("key_scale", key_scale, q, tuple(k.shape[:3]), "[B, Hkv, Sk]")
        key_scale = key_scale.to(_scale_dtype(q))
    constant = q.shape[-1] ** -0.5 if scale is None else scale
    check_number("scale", constant)
    return _attend(q, k, v, _Given(constant, query_scale, key_scale), None, options)


class _Given(Scaling):
    """The scaling of a caller who hands in the scales."""

    name = "given"

    def __init__(self, constant: float, query: Tensor | None = None, key: Tensor | None = None) -> None:
        self._scales = Scales(constant, query, key)

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        return self._scales

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor | float:
        factor, (query, key) = self._scales.constant, (self._scales.query, self._scales.key)
        if query is not None:
            factor = factor * query[..., None]
        if key is not None:
            if key.dim() > 1 and key.shape[-2] > 1:
                key = key.repeat_interleave(k.shape[1] // key.shape[-2], dim=-2)  # one row a query head
            factor = factor * key[..., None, :] if key.dim() else factor * key
        return factor


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in the dtype of torch.autocast where it is on; float64 stays, as in torch's own operators."""
    if not isinstance(q, Tensor) or not _autocast_is_on(q):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)

    def cast(x: Tensor) -> Tensor:
        eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if eligible else x

    return cast(q), cast(k), cast(v)


def _autocast_is_on(q: Tensor) -> bool:
    device = q.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _resolve(scaling: str | Scaling | float | Tensor, q: Tensor) -> Scaling:
    if isinstance(scaling, str):
        return named_scaling(scaling)
    if isinstance(scaling, Scaling):
        return scaling
    if isinstance(scaling, Tensor):
        check_factor("scaling", scaling, q, tuple(q.shape[:3]), "[B, Hq, Sq]")
        return _Given(1.0, scaling.to(_scale_dtype(q)))
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        refuse_scaling(scaling)
    check_number("scaling", scaling)
    return _Given(scaling)


def _checked_gain(gain: float | Tensor | None, q: Tensor) -> float | Tensor | None:
    if isinstance(gain, Tensor):
        check_factor("gain", gain, q, tuple(q.shape[:3]), "[B, Hq, Sq]")
        return gain.to(_scale_dtype(q))
    if gain is not None:
        check_number("gain", gain)
    return gain


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scaling: Scaling, gain: float | Tensor | None, options: Options
) -> Tensor | tuple[Tensor, AttentionAux]:
    if _autocast_is_on(q):
        with torch.autocast(q.device.type, enabled=False):
            return _attend(q, k, v, scaling, gain, options)
    backend = _backend(q, k, v, options)
    visibility = Visibility.of(
        q, k, causal=options.causal, window=options.window, key_lengths=options.key_lengths,
        key_ranges=options.key_ranges, mask=options.mask,
    )  # fmt: skip
    dropout = Dropout.draw(options.dropout_p, q.device) if options.dropout_p > 0 else None
    sinks = None if options.sinks is None else options.sinks.to(_scale_dtype(q))
    if backend == "reference":
        factor = _multiplier(q, k, visibility, scaling, gain)
        result = reference.attention(
            q, k, v, factor, visibility, softcap=options.softcap, sinks=sinks, dropout=dropout
        )  # fmt: skip
    else:
        statistics = (ops.KernelStatistics if backend == "triton" else Statistics)(k, visibility)
        constant, query, key = _scales(q, k, visibility, statistics, scaling, gain)
        call = AttentionCall(q, k, v, visibility, constant, query, key, options.softcap, sinks, dropout)
        if not options.return_aux:
            return _out(call, backend)
        result = ops.attention(call, backend, aux=True)
    if not options.return_aux:
        return result.out
    return result.out, AttentionAux._make(result[1:])


def _backend(q: Tensor, k: Tensor, v: Tensor, options: Options) -> str:
    """The backend that runs the call: the one asked for, which must be able to, or one that can."""
    asked = options.backend
    if asked == "triton" and (obstacle := _kernel_obstacle(q, v, options)):
        ops.refuse(obstacle, "triton")
    if q.numel() == 0 or k.numel() == 0:
        return "sdpa"  # nothing to compute
    if asked in ("sdpa", "reference"):
        return asked
    if asked == "auto":
        if q.device.type != "cuda":
            return "sdpa"
        if obstacle := _kernel_obstacle(q, v, options) or (not _HAS_TRITON and "triton is not installed"):
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


def _kernel_obstacle(q: Tensor, v: Tensor, options: Options) -> str | None:
    """The first argument that kernels cannot honour."""
    if q.dtype == torch.float64:
        return "q of dtype torch.float64"
    if max(q.shape[3], v.shape[3]) > _LARGEST_KERNEL_DIM:
        return f"head_dim {max(q.shape[3], v.shape[3])}, above {_LARGEST_KERNEL_DIM}"
    return ops.unsupported(
        "triton",
        softcap=options.softcap is not None,
        sinks=options.sinks is not None,
        dropout_p=options.dropout_p > 0,
        return_aux=options.return_aux,
    )


def _check_kernels_run_on(device: torch.device) -> None:
    if device.type == "cuda":
        return
    from . import launch

    if not launch.runs_on(device):
        raise ValueError(
            f"backend: 'triton' expects tensors on a CUDA or HIP device, got {device}; kernels run on CPU"
            " tensors only in triton's interpreter, with TRITON_INTERPRET=1 in the environment"
        )


def _warn_once(message: str) -> None:
    if not torch.compiler.is_compiling():
        _warn(message)


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=6)


def _out(call: AttentionCall, backend: str) -> Tensor:
    # torch maps its own attention in a loop under vmap; our operators fold the mapped axis into the batch.
    if backend == "sdpa" and not is_transformed() and sdpa.supports(call):
        return sdpa.attention(call)
    return ops.attention(call, backend, aux=False).out


def _multiplier(
    q: Tensor, k: Tensor, visibility: Visibility, scaling: Scaling, gain: float | Tensor | None
) -> Tensor | float:
    """The factor of every pair as the mode's formula says it, for the reference."""
    group = visibility.q_heads // visibility.kv_heads
    visible = visibility.dense()
    factor = scaling.multiplier(q, k.repeat_interleave(group, dim=1), visible)
    if isinstance(factor, Tensor):
        check_multiplier(scaling, factor, (*q.shape[:3], k.shape[2]))
    else:
        check_number(f"{type(scaling).__name__}.multiplier()", factor)
    if gain is None:
        return factor
    return factor * (gain[..., None] if isinstance(gain, Tensor) else gain)


def _scales(
    q: Tensor,
    k: Tensor,
    visibility: Visibility,
    statistics: Statistics,
    scaling: Scaling,
    gain: float | Tensor | None,
) -> tuple[float, Tensor | None, Tensor | None]:
    """The mode's scales times the gain, as a float, [B, Hq, Sq] and [B, Hkv, Sk]."""
    scales = scaling.scales(q, k, visibility, statistics)
    name = f"{getattr(scaling, 'name', type(scaling).__name__)}.scales()"
    if not isinstance(scales, Scales):
        raise TypeError(f"{name}: expected Scales, got {type(scales).__name__}")
    check_number(f"{name}.constant", scales.constant)
    constant, query, key, dtype = scales.constant, scales.query, scales.key, _scale_dtype(q)
    if query is not None:
        query = _per_query_head(f"{name}.query", query, q, k)
    if isinstance(gain, Tensor):
        query = gain if query is None else query * gain
    elif gain is not None:
        constant = constant * gain
    if query is not None:
        query = query.to(dtype).expand(q.shape[:3])
        if not visibility.every_row_sees:  # there a mode may have divided by 0
            query = torch.where(visibility.counts() > 0, query, 0)
    if key is not None:
        check_factor(f"{name}.key", key, q, tuple(k.shape[:3]), "[B, Hkv, Sk]")
        key = key.to(dtype).expand(k.shape[:3])
    return constant, query, key


def _per_query_head(name: str, query: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A query scale broadcastable to [B, Hq, Sq], from one that may have a row a key head."""
    q_heads, kv_heads = q.shape[1], k.shape[1]
    check_tensor(name, query, "[B, Hq, Sq]")
    if query.dim() > 1 and 1 < query.shape[-2] == kv_heads != q_heads:
        check_factor(name, query, q, (q.shape[0], kv_heads, q.shape[2]), "[B, Hkv, Sq]")
        return query.repeat_interleave(q_heads // kv_heads, dim=-2)
    check_factor(name, query, q, tuple(q.shape[:3]), "[B, Hq, Sq]")
    return query


def _scale_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)
