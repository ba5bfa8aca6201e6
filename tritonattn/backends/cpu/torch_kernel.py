"""The CPU path for plain and square-causal calls: scales folded into q and k, then PyTorch's attention.

torch.nn.functional.scaled_dot_product_attention has one fast kernel for CPUs. Its memory is O(S D), backward
included. It leaves that kernel for an O(Sq Sk) one where v's head_dim differs from q's or a last axis is
strided, so the narrower operands are padded with zeros and strided ones copied. Key heads are not expanded.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import pad, scaled_dot_product_attention

from ...core.autograd import gradients_again, kept, needs_graph, transforms_are_active, values_are_read
from ...core.call import AttentionCall, ForwardResult
from ...core.eight_bit import EIGHT_BIT
from ...core.norms import key_norms_of
from ...core.private_names import DisableTorchFunction, attribute, deferred
from ...core.terms import Terms, others_than
from ...core.visibility import Visibility
from ..protocol import Attend
from . import few_keys, few_rows

_current_autograd_node = deferred("torch._C._current_autograd_node")
_SAVED = tuple(f"torch.autograd.graph.Node._saved_{name}" for name in ("query", "key", "value"))

# Keys that PyTorch's kernel for CPUs compares at a time, at most.
VECTOR = 16

# From torch 2.9 on PyTorch's kernel for CPUs serves several query heads with one key head.
SHARES_KEY_HEADS = torch.__version__ >= "2.9"

# The terms that it does not have.
_OTHERS = others_than("query_scale", "key_scale")

# Logits must stay below it in PyTorch's kernel: fp32 ends at 3.4e38.
_LARGEST_LOGIT = 1e38

# The largest norm of a scaled query times that of a key, over sqrt(D), for which a q that was rounded to bf16 leaves
# the output within two thirds of its error bound; from 12 on it does not.
_LARGEST_ROUNDED = 8.0


def supports(call: AttentionCall, is_full: bool) -> bool:
    """True where `attention` computes this call: all keys or a square's lower triangle visible, and no extras."""
    terms, visible = call.terms, call.visibility
    if call.dropout is not None or call.k.dtype == EIGHT_BIT:
        return False
    for number, default in _OTHERS:  # not `has_any`: plain calls are counted in microseconds
        if terms[number] is not default:
            return False
    if call.aux or visible.invariant or 0 in call.q.shape or 0 in call.k.shape or 0 in call.v.shape:
        return False
    if not (is_full or visible.is_square_causal):
        return False
    # A trace may leave lengths free, and an answer would bind them.
    return torch.compiler.is_compiling() or visible.k_len >= VECTOR or not _hides_nan(call)


def _hides_nan(call: AttentionCall) -> bool:
    """True where PyTorch's kernel may take a row of NaN for one without keys, and return 0 or uninitialised memory.

    Its maximum ignores NaN in a remainder of keys that fills no vector; fewer keys than a vector are all remainder.
    """
    operands = (call.q, call.k, call.terms.query_scale, call.terms.key_scale)
    return values_are_read(*operands) and not stays_finite(call)


def stays_finite(call: AttentionCall, *others: Tensor) -> bool:
    """True where no logit before its biases is NaN or leaves fp32, nor others; reads values.

    The product of all norms bounds every logit and every sum on the way to it.
    """
    operands = (call.q, call.k, call.terms.query_scale, call.terms.key_scale)
    bound = math.prod(_norm(x) for x in operands if x is not None)
    return max(1.0, abs(call.terms.scale)) * bound < _LARGEST_LOGIT and all(math.isfinite(_norm(x)) for x in others)


def _norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x.detach(), dtype=torch.promote_types(x.dtype, torch.float32)).item()


def attention(call: AttentionCall, again: Attend) -> ForwardResult | None:
    """The output [B, Hq, Sq, Dv], without an lse, differentiable by autograd; None for calls of tiles.

    By PyTorch's kernel what it `supports`; before it `few_rows`, behind it `few_keys`.
    PyTorch's kernel has neither a tangent nor gradients of gradients: None in forward mode, and `again` for the latter.

    The scales are folded in q's dtype: exact to rounding in fp32 and fp64, while in bf16 q * query_scale and
    k * key_scale are rounded to bf16 once before they meet, where logits are small enough for it.
    """
    if call.v.dtype == torch.bfloat16 and few_rows.takes(call) and (found := few_rows.attention(call)) is not None:
        return found
    # torch maps its attention in a loop under vmap; our operators fold the mapped axis into the batch.
    if call.visibility.at_lengths:
        call = _over_written_keys(call)
    is_full = call.visibility.is_full
    if transforms_are_active() or forward_ad._current_level >= 0 or not supports(call, is_full):
        return few_keys.attention(call, again) if call.terms.bias is not None and few_keys.takes(call) else None
    dtype = call.v.dtype
    if dtype.itemsize == 2 and _needs_fp32(call):
        call = call.changed(q=call.q.float(), k=call.k.float(), v=call.v.float())
    scale, query_scale, key_scale = call.terms.scale, call.terms.query_scale, call.terms.key_scale
    has_lone_keys = call.k.shape[2] == 1 or not is_full
    if has_lone_keys and needs_graph(call.q, call.k, query_scale, key_scale):
        query_scale = _without_lone_keys(query_scale, call)
    q = call.q if query_scale is None else _fold(call.q, query_scale)
    k, v = call.k if key_scale is None else _fold(call.k, key_scale), call.v
    if scale <= 0:  # the kernel hides keys by -inf before it multiplies
        q, scale = q * (-1 if scale < 0 else 0), -scale or 1.0
    if not SHARES_KEY_HEADS and q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    width, value_width = max(q.shape[-1], v.shape[-1]), v.shape[-1]
    shape, group = q.shape[:3], q.shape[1] // k.shape[1]
    folds = is_full and folds_rows(q, group)
    if folds:
        q = q.unflatten(1, (-1, group)).flatten(2, 3)
    q, k, v = for_kernel(q, width), for_kernel(k, width), for_kernel(v, width)
    with DisableTorchFunction():  # a mode such as `integrations.sdpa`'s takes the models' calls, not this one
        out = scaled_dot_product_attention(
            q,
            k,
            v,
            scale=scale,
            is_causal=False if is_full else True,  # under torch.compile is_full may be a SymBool
            enable_gqa=True if q.shape[1] != k.shape[1] else False,
        )
    if out.requires_grad and not torch.compiler.is_compiling():
        _differentiate_twice(out, is_full, scale, again)
    out = out.reshape(*shape, -1) if folds else out
    out = out if value_width == width else out[..., :value_width]
    out = out if out.dtype == dtype else out.to(dtype)
    return ForwardResult(out, None)  # pyright: ignore[reportArgumentType]


def _over_written_keys(call: AttentionCall) -> AttentionCall:
    """A step over caches of one length as a call over the keys written there; other calls as they are."""
    visible = call.visibility
    if visible.invariant or call.block_table is not None:
        return call
    length = few_rows.one_length(visible)
    if length == 0 or call.k.dtype == EIGHT_BIT or is_widened(call.q, call.q.shape[1] // max(call.k.shape[1], 1)):
        return call
    k, v, terms = call.k[:, :, :length], call.v[:, :, :length], call.terms
    if terms.key_scale is not None:
        terms = terms.changed(key_scale=terms.key_scale[:, :, :length])
    return call.changed(k=k, v=v, terms=terms, visibility=Visibility.of(call.q, k))


def _differentiate_twice(out: Tensor, is_full: bool, scale: float, again: Attend) -> None:
    """Let gradients of gradients of an output of PyTorch's kernel be those of `again`. Its other ways have their own.

    The hook holds no tensor: it reads those that autograd has saved.
    """
    node = out.grad_fn
    while not hasattr(type(node), "_saved_query"):  # of the node itself it would unpack the tensor
        if node is None or len(node.next_functions) != 1:
            return
        node = node.next_functions[0][0]  # padded operands
    node.register_hook(functools.partial(_gradients_again, is_full, scale, again))  # pyright: ignore[reportOptionalMemberAccess]


def _gradients_again(
    is_full: bool, scale: float, again: Attend, results: tuple[Tensor | None, ...], gradients: tuple[Tensor, ...]
) -> Any:
    """The gradients of PyTorch's kernel as a function of its operands, where their graph is asked for, else None."""
    if not torch.is_grad_enabled():
        return None
    operands, needs = _saved_operands(_current_autograd_node()), [result is not None for result in results]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return again(AttentionCall(q, k, v, Visibility.of(q, k, causal=not is_full), Terms(scale))).out

    return gradients_again(plain, operands, needs, gradients[0])


def _saved_operands(node: Any) -> list[Tensor]:
    """q, k and v of a node of PyTorch's kernel, read in a backward of their own: a checkpoint hands each out once."""
    found: list[Tensor] = []
    probe = torch.zeros((), requires_grad=True)
    probe.register_hook(lambda _: found.extend(attribute(node, path) for path in _SAVED))
    torch.autograd.grad(probe + 0, probe)
    return found


def folds_rows(q: Tensor, group: int) -> bool:
    """True where the query heads of a key head go to the kernel as rows, so that keys are read once: few rows."""
    return group > 1 and not torch.compiler.is_compiling() and q.shape[2] <= few_rows.FEW_ROWS


def is_widened(q: Tensor, group: int) -> bool:
    """True where few rows, of which those of `group` heads share keys, meet 16-bit keys in fp32.

    For each block of keys the kernel calls oneDNN, which takes longer than to widen them: for a lone row, and in fp16.
    """
    is_few = q.shape[2] <= few_rows.FEW_ROWS if q.dtype == torch.float16 else q.shape[2] * group == 1
    return q.dtype.itemsize == 2 and is_few


def _needs_fp32(call: AttentionCall) -> bool:
    """True where PyTorch's kernel in the call's 16 bits would be off by more than rounding its operands.

    A scaled q can leave the range of fp16: 1 / n of a long sequence is subnormal. Gradients lose more: the kernel takes
    delta = out . d_out from a rounded output, an error that d_q has times the mean key and d_query_scale times the mean
    logit, and it sums those of a key head over its query heads and over blocks of 64 or 256 rows in 16 bits.
    """
    dtype, logits = call.v.dtype, call.terms
    is_scaled = logits.query_scale is not None or logits.key_scale is not None
    if call.narrowed() is not call or (dtype == torch.float16 and is_scaled):
        return True
    is_on_cpu = call.q.device.type == "cpu"
    if (is_scaled or is_on_cpu) and needs_graph(*call.tensors()):
        return True
    return is_scaled and is_on_cpu and not _may_round(call)


def _may_round(call: AttentionCall) -> bool:
    """True where logits are known to be so small that rounding scaled operands moves them little: see above."""
    terms, bound = call.terms, abs(call.terms.scale)
    if not values_are_read(call.q, call.k, terms.query_scale, terms.key_scale):
        return False
    for x, scale in ((call.q, terms.query_scale), (call.k, terms.key_scale)):
        norms = key_norms_of(x.detach())
        bound *= (norms if scale is None else norms * scale).abs().amax().item()
    return bound <= _LARGEST_ROUNDED * call.q.shape[-1] ** 0.5


def _without_lone_keys(query_scale: Tensor | None, call: AttentionCall) -> Tensor:
    """query_scale, or 1 a row, with 0 for rows of one key, whose softmax is 1, whatever the one logit.

    They are all rows over one key, or the first of a square causal call. The gradients of that logit are then exactly
    0. PyTorch's kernel leaves their rounding, which can exceed all other gradients: with two tokens, or with a scale of
    1 / n, which is largest in the first causal row.
    """
    q = call.q
    scale = kept(_rows_of_more_keys, q.device, q.shape[2], call.k.shape[2] == 1, q.dtype)
    return scale if query_scale is None else query_scale * scale


def _rows_of_more_keys(device: torch.device, q_len: int, has_lone_key: bool, dtype: torch.dtype) -> Tensor:
    """1 for rows of more than one key, 0 for the first, or for all where has_lone_key: [Sq]."""
    scale = torch.ones(q_len, dtype=dtype, device=device)
    (scale if has_lone_key else scale[:1]).zero_()
    return scale


def _fold(x: Tensor, scale: Tensor) -> Tensor:
    """x [B, H, S, D] times scale [B, H, S], in x's dtype."""
    folded = x * scale[..., None]
    return folded if folded.dtype == x.dtype else folded.to(x.dtype)


def for_kernel(x: Tensor, width: int) -> Tensor:
    """x with the head_dim and the strides that PyTorch's fast kernel takes.

    The kernel reads foreign memory where rows overlap, as those of `unfold` do.
    """
    if x.shape[-1] < width:
        x = pad(x, (0, width - x.shape[-1]))  # keeps the order of axes
    is_taken = x.stride(-1) == 1 and x.stride(-2) >= width
    return x if is_taken else x.clone(memory_format=torch.contiguous_format)
