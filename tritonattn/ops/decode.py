"""`tritonattn::decode`: a decode call laid out flat. No gradient: the operator refuses to be differentiated."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import cpu as blockwise
from ..backends import kernels
from ..core.autograd import runs_eagerly
from ..core.call import ForwardResult, Logits
from ..core.decode_call import Cache, DecodeCall
from .mapping import in_a_loop
from .schema import arguments_of, operator


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
    def of(cls, call: DecodeCall, backend: str, aux: bool) -> _Flat:
        cache, (scale, query_scale, key_scale, key_bias, softcap, sinks) = call.cache, call.logits
        tensors = (call.q, cache.k, cache.v, cache.key_lengths, cache.block_table, cache.query_lengths)
        vectors = (query_scale, key_scale, key_bias, sinks)
        return cls(*tensors, *vectors, scale, call.left, softcap, call.invariant, aux, backend)

    def call(self) -> DecodeCall:
        cache = Cache(self.k, self.v, self.key_lengths, self.block_table, self.query_lengths)
        logits = Logits(self.scale, self.query_scale, self.key_scale, self.key_bias, self.softcap, self.sinks)
        return DecodeCall(self.q, cache, logits, self.left, self.invariant)


def decode(call: DecodeCall, backend: str, aux: bool) -> ForwardResult:
    """Run a call on "triton" or "sdpa", without gradients; max_logit and entropy are None without aux."""
    cache, logits = call.cache, call.logits
    scales = (logits.query_scale, logits.key_scale, logits.key_bias, logits.sinks)
    if runs_eagerly(call.q, cache.k, cache.v, cache.key_lengths, *scales):
        return _decode(call, backend, aux)
    result = ForwardResult(*_decode_operator(*_Flat.of(call, backend, aux)))
    return result if aux else ForwardResult(result.out, result.lse)


def _decode(call: DecodeCall, backend: str, aux: bool) -> ForwardResult:
    if backend != "triton":
        return blockwise.forward(call.as_attention().gathered(), aux)
    if call.invariant:  # no split of keys, and the loop of other calls
        return kernels().forward(call.as_attention(), aux)
    return kernels().decode(call, aux)


@operator("decode", arguments_of(_Flat), "(Tensor out, Tensor lse, Tensor max_logit, Tensor entropy)")
def _decode_operator(*arguments):
    flat = _Flat(*arguments)
    with torch.no_grad():
        result = _decode(flat.call(), flat.backend, flat.aux)
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
