"""`tritonattn::decode`: a decode call laid out flat. No gradient: the operator refuses to be differentiated."""

from __future__ import annotations

from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from ..backends import cpu as blockwise
from ..backends import kernels
from ..core.autograd import runs_eagerly
from ..core.call import AttentionCall, ForwardResult, Logits
from ..core.decode_call import of_padded
from .flat import Argument
from .mapping import in_a_loop
from .schema import operator, schema_of


class _Flat(NamedTuple):
    """A DecodeCall as the arguments of the operator."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_lengths: Tensor
    block_table: Tensor | None
    query_lengths: Tensor | None
    query_scale: Tensor | None
    key_scale: Tensor | None
    key_bias: Tensor | None
    sinks: Tensor | None
    scale: float
    left: int | None
    softcap: float | None
    invariant: bool
    aux: bool
    backend: str

    @classmethod
    def of(cls, call: AttentionCall) -> _Flat:
        visible, (scale, query_scale, key_scale, key_bias, softcap, sinks) = call.visibility, call.logits
        tensors = (call.q, call.k, call.v, visible.key_lengths, call.block_table, visible.query_lengths)
        vectors = (query_scale, key_scale, key_bias, sinks)
        return cls(*tensors, *vectors, scale, visible.left, softcap, visible.invariant, call.aux, call.backend)

    def call(self) -> AttentionCall:
        (batch, q_heads, q_len, _), (_, kv_heads, k_len, _) = self.q.shape, self.k.shape
        if self.block_table is not None:
            k_len *= self.block_table.shape[1]
        sizes = (batch, q_heads, kv_heads, q_len, k_len)
        visible = of_padded(
            sizes, self.q.device, self.key_lengths, self.query_lengths, left=self.left, invariant=self.invariant
        )
        logits = Logits(self.scale, self.query_scale, self.key_scale, self.key_bias, self.softcap, self.sinks)
        own = {"block_table": self.block_table, "aux": self.aux, "backend": self.backend, "cached": "decode"}
        return AttentionCall(self.q, self.k, self.v, visible, logits, **own)


def decode(call: AttentionCall) -> ForwardResult:
    """Run a call whose rows stand at the end of a cache: no gradients; max_logit and entropy are None without aux."""
    if runs_eagerly(*call.tensors, call.visibility.key_lengths):
        return _decode(call)
    result = ForwardResult(*_decode_operator(*_Flat.of(call)))
    return result if call.aux else ForwardResult(result.out, result.lse)


def _decode(call: AttentionCall) -> ForwardResult:
    if call.backend != "triton":
        return blockwise.forward(call.gathered().by_ranges(), call.aux)
    if call.invariant:  # no split of keys, and the loop of other calls
        return kernels().forward(call.by_ranges(), call.aux)
    return kernels().decode(call, call.aux)


_ARGUMENTS = schema_of(Argument((name,), kind) for name, kind in get_type_hints(_Flat).items())


@operator("decode", _ARGUMENTS, "(Tensor out, Tensor lse, Tensor max_logit, Tensor entropy)")
def _decode_operator(*arguments):
    flat = _Flat(*arguments)
    with torch.no_grad():
        result = _decode(flat.call())
    return tuple(result.lse.new_empty(0) if x is None else x for x in result)


@_decode_operator.register_fake
def _(*arguments):
    flat = _Flat(*arguments)
    rows, dtype = flat.q.shape[:3], torch.promote_types(flat.q.dtype, torch.float32)
    lse, *aux = (flat.q.new_empty(shape, dtype=dtype) for shape in (rows, *[rows if flat.aux else (0,)] * 2))
    return (flat.q.new_empty((*rows, flat.v.shape[3])), lse, *aux)


def _vmap(info: Any, in_dims: Any, *arguments: Any):
    return in_a_loop(_decode_operator, info.batch_size, in_dims, arguments)


_decode_operator.register_vmap(_vmap)
