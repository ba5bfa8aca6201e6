"""`attention` and `scaled_attention`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ..core.call import Request
from ..core.terms import Terms
from ..core.visibility import Visibility
from ..scaling import Given, Scaling
from ..scaling.names import ModeName
from .checks import (
    FLOATS,
    INTEGERS,
    Backend,
    as_float,
    broadcasts,
    check,
    check_factor,
    check_masks,
    check_number,
    check_tensor,
    operands,
    refuse_unclear,
    scale_dtype,
    shape_of,
)
from .dispatch import run
from .dtensors import BATCHED
from .public import public
from .results import AttentionAux
from .sequence_checks import check_order, check_values

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import Options, ScaledOptions


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_aux: Literal[False] = False, **options: Unpack[Options]
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_aux: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, AttentionAux]: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_aux: bool, **options: Unpack[Options]
) -> Tensor | tuple[Tensor, AttentionAux]: ...
@public(BATCHED)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scaling: ModeName | str | Scaling | float | Tensor = "sqrt_dim",
    gain: float | Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None,
    key_ranges: Tensor | None = None,
    mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    relative_right: int = 0,
    bias_after_softcap: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_aux: bool = False,
    backend: Backend = "auto",
    batch_invariant: bool | None = None,
) -> Tensor | tuple[Tensor, AttentionAux]:
    """Attention whose logit scaling is a parameter.

        logit[i, j] = gain[i] * factor[i, j] * (q[i] . k[j]) + key_bias[j] + bias[i, j] + relative[i, j]
        out[i]      = sum_j softmax_j(logit[i, j]) * v[j]          over the keys j visible to row i

    Args:
        q: [B, Hq, Sq, D], float16, bfloat16, float32 or (not in kernels) float64; any strides.
        k: [B, Hkv, Sk, D] in q's dtype. Hkv divides Hq: query head h reads key head h // (Hq / Hkv).
        v: [B, Hkv, Sk, Dv] in q's dtype.
        scaling: The factor: a name in `SCALINGS`, a `Scaling`, a float (the factor itself), or a tensor
            broadcastable to [B, Hq, Sq], which gets a gradient. "sqrt_dim" is 1 / sqrt(D), and "log_key_count:64" is
            ln(n) / ln(64) / sqrt(D), with the trained length as base.
        gain: A float, or a tensor broadcastable to [B, Hq, Sq] (one per head: [Hq, 1]), which gets a gradient.
        causal: Row i attends to the keys j <= i + Sk - Sq (bottom-right).
        window: (left, right): row i attends to i + Sk - Sq - left <= j <= i + Sk - Sq + right; None, -1: no limit.
        key_lengths: Integers [B]: keys at and after it are invisible.
        key_ranges: Integers [B, Sq, 2] or [B, 1, Sq, 2]: row i attends to lo <= j < hi of its pair (lo, hi), none where
            lo = hi. `document_ranges` makes them of document ids.
        mask: bool, broadcastable to [B, Hq, Sq, Sk], True is visible: for masks with holes; slower. [n, Sq, Sk] with n
            above 1 is refused: mask[:, None] is one mask a sequence, mask[None] one a head.
        key_bias: Floating, broadcastable to [B, Hq, Sk] or [B, Hkv, Sk]: added to the logits of key j before the
            softcap; gets a gradient. [n, Sk] where n is B and a number of heads is refused, but for a bias that is
            `nn.counted_from_rows`: key_bias[:, None] is one a sequence, key_bias[None] one a head. A key with -inf has
            no weight, with softcap too, and a row of only such keys is as one that attends to none; but the scaling
            counts it, and NaN in k or v passes on: `mask` and `key_lengths` hide keys. NaN, and +inf unless a softcap
            caps it, give NaN in the rows that attend to the key.
        bias: Floating, broadcastable to [B, Hq, Sq, Sk], of three axes as mask: a number for every pair, of any
            floating dtype, which stays; its memory is O(Sq Sk), and so is that of its gradient. -inf, +inf and NaN as
            in key_bias; values of invisible pairs are not read.
        relative_bias: Floating, [B or 1, Hq or 1, Sq or 1, extent]: a number for every distance; gets a gradient.
            relative[i, j] = relative_bias[..., i, i + Sk - Sq - j + relative_right], and 0 outside of the extent:
            entry t belongs to the key t positions before the row's position, which is that of `causal`.
        relative_right: How many entries, the first ones, belong to keys after the row's position: then entry
            t + relative_right belongs to the key t before.
        bias_after_softcap: Add the three biases after the softcap: logit -> c * tanh(logit / c) + biases, of which
            lse, entropy and max_logit then are. Without a bias it changes nothing.
        softcap: c > 0: logit -> c * tanh(logit / c), after scaling and with the biases.
        sinks: [Hq], or broadcastable to [B, Hq, Sq]: a logit of each row that joins the softmax's denominator only,
            neither scaled nor capped; gets a gradient. -inf is no sink, +inf gives zeros, and NaN gives NaN in rows
            that attend to keys. With a key_bias that is `nn.counted_from_rows` the row's part is added to it.
        dropout_p: Chance in [0, 1) to drop a probability; the others are multiplied by 1 / (1 - dropout_p).
            The bits follow torch.manual_seed and are the same on every backend.
        return_aux: Return (out, `AttentionAux`).
        backend: "auto", "triton" (kernels), "flash" (FlashAttention 4, 3 or 2 or cuDNN, if installed; q times its
            factor is rounded to 16 bits), "sdpa" (PyTorch) or "reference" (eager, O(Sq Sk)). "auto" runs kernels for
            CUDA and HIP tensors, and PyTorch for others and for calls that kernels cannot run (it warns once).
        batch_invariant: The bits of a row of the results, and of its gradients, do not depend on the batch, on padding
            and packing, on prefill or decode: docs/batch-invariance.md. None is `tritonattn.batch_invariant()`'s.

    causal, window, key_lengths, key_ranges and mask narrow one another. Key lengths and ranges on a GPU are
    clamped to [0, Sk] and never read by the host; on a CPU they are checked.

    Returns:
        [B, Hq, Sq, Dv] in q's dtype. A row that attends to no key gives zeros and no gradient. Keys hidden from
        every row of a batch entry never affect a result, even if they hold NaN or inf. Derivatives are those of
        forward and reverse mode up to second order: jvp, its gradient, gradients of gradients, Hessians.

    Raises:
        TypeError: A type or dtype.
        ValueError: A shape, device, value or name.
        NotImplementedError: An argument that the backend asked for cannot honour.
        ImportError: Backend "triton" without triton, or "flash" without a library of attention.

    Under torch.autocast q, k and v are cast as `F.scaled_dot_product_attention` casts them. q, k and v may be DTensors
    sharded by batch and heads; the result is one placed as q is. Under torch's context_parallel the call raises.

    >>> import torch, tritonattn
    >>> q, k, v = torch.randn(3, 1, 4, 16, 8)
    >>> tritonattn.attention(q, k, v, scaling="key_norm_mean", causal=True).shape
    torch.Size([1, 4, 16, 8])

    Sources: Vaswani et al. 2017, arXiv:1706.03762 (sqrt_dim); Bernhard 2023, arXiv:2311.09406 (key_norm_sum);
    each mode names its source. Dao 2023, arXiv:2307.08691 (the algorithm). Biases of distances: Raffel et al. 2020,
    arXiv:1910.10683 (T5); Press et al. 2022, arXiv:2108.12409 (ALiBi).
    """
    q, k, v = operands(q, k, v)
    visible = batch_visibility(q, k, causal, window, key_lengths, key_ranges, mask, batch_invariant)
    terms = Terms(
        key_bias=key_bias,
        sinks=sinks,
        bias=bias,
        relative_bias=relative_bias,
        softcap=softcap,
        relative_right=relative_right,
        bias_after_softcap=bias_after_softcap,
    )
    request = Request(
        q, k, v, visible, terms, scaling=scaling, gain=gain, dropout_p=dropout_p, aux=return_aux, backend=backend
    )
    return run(check(request))


@overload
def scaled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    *,
    return_aux: Literal[False] = False,
    **options: Unpack[ScaledOptions],
) -> Tensor: ...
@overload
def scaled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    *,
    return_aux: Literal[True],
    **options: Unpack[ScaledOptions],
) -> tuple[Tensor, AttentionAux]: ...
@overload
def scaled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    *,
    return_aux: bool,
    **options: Unpack[ScaledOptions],
) -> Tensor | tuple[Tensor, AttentionAux]: ...
@public(BATCHED)
def scaled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    *,
    scale: float | None = None,
    relative_scale: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None,
    key_ranges: Tensor | None = None,
    mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    relative_right: int = 0,
    bias_after_softcap: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_aux: bool = False,
    backend: Backend = "auto",
    batch_invariant: bool | None = None,
) -> Tensor | tuple[Tensor, AttentionAux]:
    """Attention with explicit scales, to which every scaling comes down.

        logit[i, j] = scale * (q[i] . k[j]) * query_scale[i] * key_scale[j] * of_distance[i, j] + the biases

    Args:
        query_scale: Floating, broadcastable to [B, Hq, Sq]; any sign, 0 included; gets a gradient.
        key_scale: Floating, broadcastable to [B, Hkv, Sk], likewise.
        scale: A finite float; None is 1 / sqrt(D).
        relative_scale: of_distance by distance, as relative_bias has relative, with the same relative_right; 1 outside
            of its extent; gets a gradient.

    The other arguments, the result and the errors are those of `attention`. Scales are float32 (float64 for
    float64 q), whatever their dtype.

    >>> import torch, tritonattn
    >>> q = k = v = torch.randn(1, 2, 5, 8)
    >>> tritonattn.scaled_attention(q, k, v, torch.full((2, 1), 0.5), scale=1.0).shape
    torch.Size([1, 2, 5, 8])
    """
    q, k, v = operands(q, k, v)
    visible = batch_visibility(q, k, causal, window, key_lengths, key_ranges, mask, batch_invariant)
    if query_scale is not None:
        check_factor("query_scale", query_scale, q, visible.rows, "[B, Hq, Sq]")
        query_scale = query_scale.to(scale_dtype(q))
    if key_scale is not None:
        check_factor("key_scale", key_scale, q, visible.keys, "[B, Hkv, Sk]")
        key_scale = key_scale.to(scale_dtype(q))
    constant = q.shape[-1] ** -0.5 if scale is None else scale
    check_number("scale", constant)
    constant = as_float(constant)
    terms = Terms(
        key_bias=key_bias,
        sinks=sinks,
        bias=bias,
        relative_bias=relative_bias,
        relative_scale=relative_scale,
        softcap=softcap,
        relative_right=relative_right,
        bias_after_softcap=bias_after_softcap,
    )
    given = Given(constant, query_scale, key_scale)
    request = Request(q, k, v, visible, terms, scaling=given, dropout_p=dropout_p, aux=return_aux, backend=backend)
    return run(check(request))


def batch_visibility(
    q: Tensor,
    k: Tensor,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None,
    key_ranges: Tensor | None = None,
    mask: Tensor | None = None,
    batch_invariant: bool | None = None,
) -> Visibility:
    """The keys visible to each row, of checked q [B, Hq, Sq, D] and k; raises for a mask that does not fit them."""
    invariant = check_masks(causal, window, batch_invariant)
    if key_lengths is not None:
        check_tensor("key_lengths", key_lengths, "[B]", INTEGERS, q, sizes=q.shape[:1])
        check_values("key_lengths", key_lengths, k.shape[2])
    if key_ranges is not None:
        _check_key_ranges(key_ranges, q, k)
    if mask is not None:
        _check_mask(mask, q, (*q.shape[:3], k.shape[2]))
    return Visibility.of_shapes(
        q.shape,
        k.shape,
        q.device,
        causal=causal,
        window=window,
        key_lengths=key_lengths,
        key_ranges=key_ranges,
        mask=mask,
        invariant=invariant,
    )


def _check_key_ranges(key_ranges: Any, q: Tensor, k: Tensor) -> None:
    check_tensor("key_ranges", key_ranges, "[B, Sq, 2] or [B, 1, Sq, 2]", INTEGERS, q)
    batch, _, rows, _ = q.shape
    if key_ranges.shape != (batch, rows, 2) and key_ranges.shape != (batch, 1, rows, 2):
        wanted = f"[B, Sq, 2] = {[batch, rows, 2]} or [B, 1, Sq, 2] = {[batch, 1, rows, 2]}"
        raise ValueError(f"key_ranges: expected shape {wanted}, got {shape_of(key_ranges)}")
    check_values("key_ranges", key_ranges, k.shape[2])
    check_order(key_ranges)


def _check_mask(mask: Any, q: Tensor, sizes: tuple[int, ...]) -> None:
    check_tensor("mask", mask, "[B, Hq, Sq, Sk]", like=q)
    if mask.dtype != torch.bool:
        hint = "; of 0 and -inf give mask == 0, other numbers are attention's bias=" if mask.dtype in FLOATS else ""
        raise TypeError(f"mask: expected dtype torch.bool, True for visible, got {mask.dtype}{hint}")
    refuse_unclear("mask", mask, "Sq, Sk")
    if not broadcasts(mask.shape, sizes):
        expected = f"a shape broadcastable to [B, Hq, Sq, Sk] = {list(sizes)}"
        raise ValueError(f"mask: expected {expected}, got {shape_of(mask)}; a padding mask is [B, 1, 1, Sk]")
