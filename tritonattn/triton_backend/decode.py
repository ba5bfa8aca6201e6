"""From a DecodeCall to kernel launches: how many splits, their partial results, and their combination."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import AttentionCall, ForwardResult
from ..decode_call import Cache, DecodeCall
from ..kernels.decode import SHORTEST_SPLIT
from ..launch import Arguments, Plan, bounded, is_wide, plan, planned, stride_arguments
from ..tuning.config import Problem, is_short, padded_dim

_MOST_SPLITS = 64
_MOST_ROWS = 16


def decode(call: DecodeCall, aux: bool) -> ForwardResult:
    """out and lse, with aux also max_logit and entropy: the decode kernel, and the combination of several splits."""
    return planned("decode", _problem(call, aux), call.q.device, lambda chosen: _decode(call, aux, chosen))


def few_rows(call: AttentionCall) -> DecodeCall | None:
    """A call of few rows, whose programs had better share the keys, as one of decoding; None for any other.

    Rows must stand at the end of the keys, as causal ones do and a lone one that sees all of them.
    """
    visible = call.visibility
    if visible.q_len > _MOST_ROWS or call.dropout is not None:
        return None
    if visible.mask is not None or visible.sequences is not None:
        return None
    narrowed = visible.key_lengths is not None or visible.key_ranges is not None
    if narrowed and (visible.q_len > 1 or visible.left is not None):
        return None
    if visible.q_len > 1 and visible.right != 0:
        return None
    ranges = visible.key_ranges
    cache = Cache(
        call.k, call.v, visible.key_lengths,
        key_ranges=None if ranges is None else ranges.reshape(visible.batch, 2),
    )  # fmt: skip
    return DecodeCall(
        call.q, cache, call.scale, call.query_scale, call.key_scale, visible.left, call.softcap, call.sinks
    )


def _decode(call: DecodeCall, aux: bool, chosen: Plan) -> ForwardResult:
    (batch, q_heads, q_len, _), cache = call.q.shape, call.cache
    splits = _splits(call, chosen.config.block_n)
    tiles = -(-q_heads // cache.kv_heads * q_len // chosen.config.block_m)
    joined = _allocate(call, (), call.q.dtype, aux)
    parts = joined if splits == 1 else _allocate(call, (splits,), torch.float32, aux)
    names = ("split_out_ptr", "split_lse_ptr", "split_max_logit_ptr", "split_entropy_ptr")
    sinks = None if call.sinks is None else call.sinks.contiguous()
    arguments = _arguments(call) | dict(zip(names, parts, strict=True))
    arguments |= {"splits": splits, "sinks_ptr": sinks if splits == 1 else None}
    keys, values = _by_head(cache.k, cache), _by_head(cache.v, cache)
    chosen.launch((splits * tiles, cache.kv_heads, batch), arguments, is_wide(keys, values))
    if splits > 1:
        results = dict(zip(("out_ptr", "lse_ptr", "max_logit_ptr", "entropy_ptr"), joined, strict=True))
        problem = Problem(call.q.shape[3], cache.v.shape[3], call.q.dtype, sinks=sinks is not None, aux=aux)
        combined = plan("decode_combine", problem, call.q.device)
        combined.launch((q_len, q_heads, batch), arguments | results | {"sinks_ptr": sinks}, False)
    return joined


def _splits(call: DecodeCall, block_n: int) -> int:
    """Programs that share the keys of a sequence: by what the shapes let a row see, never by lengths or batch."""
    longest = call.cache.capacity
    if call.left is not None:
        longest = min(longest, call.left + call.q.shape[2])
    return min(-(-longest // (block_n * SHORTEST_SPLIT.value)), _MOST_SPLITS)


def _problem(call: DecodeCall, aux: bool) -> Problem:
    cache = call.cache
    group = call.q.shape[1] // cache.kv_heads
    return Problem(
        head_dim=call.q.shape[3],
        value_dim=cache.v.shape[3],
        dtype=call.q.dtype,
        left=call.left is not None,
        key_ranges=cache.key_ranges is not None,
        query_scale=call.query_scale is not None,
        key_scale=call.key_scale is not None,
        grouped=group > 1,
        softcap=call.softcap is not None,
        sinks=call.sinks is not None,
        aux=aux,
        block_table=cache.block_table is not None,
        packed_rows=padded_dim(group * call.q.shape[2]),
        short=is_short(call.q.shape[2], cache.capacity),
    )


def _allocate(call: DecodeCall, splits: tuple[int, ...], dtype: torch.dtype, aux: bool) -> ForwardResult:
    """Uninitialised results of every row, or of every split of every row."""
    rows = (*call.q.shape[:3], *splits)
    out = call.q.new_empty((*rows, call.cache.v.shape[3]), dtype=dtype)
    lse, *extra = (call.q.new_empty(rows, dtype=torch.float32) for _ in range(3 if aux else 1))
    return ForwardResult(out, lse, *extra)


def _arguments(call: DecodeCall) -> Arguments:
    q, cache, table = call.q, call.cache, call.cache.block_table
    lengths, ranges = cache.key_lengths, cache.key_ranges
    if lengths is not None and lengths.dtype not in (torch.int32, torch.int64):
        lengths = bounded(lengths, cache.capacity)
    if ranges is not None and ranges.dtype != torch.int32:
        ranges = bounded(ranges, cache.capacity)
    arguments = {
        "q_ptr": q, "k_ptr": cache.k, "v_ptr": cache.v, "query_scale_ptr": call.query_scale,
        "key_scale_ptr": call.key_scale, "cache_lengths_ptr": None if lengths is None else lengths.contiguous(),
        "key_ranges_ptr": None if ranges is None else ranges.contiguous(),
        "block_table_ptr": None if table is None else table.contiguous(),
        "scale": float(call.scale), "softcap": call.softcap,
        "left": None if call.left is None else min(call.left, cache.capacity), "q_len": q.shape[2],
        "capacity": cache.capacity, "page": cache.page, "pages": cache.k.shape[0],
        "table_len": 0 if table is None else table.shape[1], "q_heads": q.shape[1],
        "group": q.shape[1] // cache.kv_heads,
    }  # fmt: skip
    operands = {"q": q, "k": _by_head(cache.k, cache), "v": _by_head(cache.v, cache)}
    for name, tensor in (operands | {"query_scale": call.query_scale, "key_scale": call.key_scale}).items():
        arguments |= stride_arguments(name, tensor)
    return arguments


def _by_head(x: Tensor, cache: Cache) -> Tensor:
    """[B, Hkv, capacity, D], or pages as [N, Hkv, page, D]."""
    return x if cache.block_table is None else x.transpose(1, 2)
