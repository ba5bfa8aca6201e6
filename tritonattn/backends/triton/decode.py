"""Launches for a few rows: splits of the keys, their partial results, and the combination of these."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.call import LONGEST_QUERY, AttentionCall, ForwardResult, Logits
from ...core.dropout import Dropout
from ...core.visibility import Visibility
from ...kernels.block import Results
from ...tuning import calls as recorded
from ...tuning.calls import Size
from ...tuning.config import Problem, TileConfig, is_short, padded_dim
from ...tuning.table import Exact
from .launch import (
    Arguments,
    Kind,
    Plan,
    are_aligned,
    bounded,
    forms_of,
    is_wide,
    kind_of,
    logit_arguments,
    pages_of,
    plan,
    planned,
    strided,
)

_MOST_SPLITS = 64


class Rows(NamedTuple):
    """Arguments of the decode kernel, whose rows stand at the end of the keys; its docstring has the rest.

    k, v          [B, Hkv, capacity, D or Dv], or with a block table pages as [N, Hkv, page, D or Dv]
    key_lengths   integers [B], or None for the capacity
    key_ranges    integers [B, 1, 2] or None
    query_lengths integers [B] or None for Sq: the rows of each sequence
    """

    q: Tensor
    k: Tensor
    v: Tensor
    capacity: int
    logits: Logits
    left: int | None
    key_lengths: Tensor | None = None
    key_ranges: Tensor | None = None
    block_table: Tensor | None = None
    query_lengths: Tensor | None = None

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.kv_heads


def decode(call: AttentionCall, aux: bool) -> ForwardResult:
    """out and lse, with aux also max_logit and entropy, by the decode kernel and the combination of its splits."""
    visible = call.visibility
    rows = Rows(
        call.q,
        call.k,
        call.v,
        visible.k_len,
        call.logits,
        visible.left,
        visible.key_lengths,
        block_table=call.block_table,
        query_lengths=visible.row_counts,
    )
    return attend(rows, aux)


def are_few_rows(visible: Visibility, dropout: Dropout | None) -> bool:
    """Whether the decode kernel, whose programs share a row's keys, runs such a call, or the forward kernel.

    Rows must stand at the end of the keys: causal rows do, and a lone row that sees all keys.
    """
    if visible.mask is not None or visible.sequences is not None or dropout is not None:
        return False
    narrowed = visible.key_lengths is not None or visible.key_ranges is not None
    stand_at_the_end = visible.q_len == 1 or (visible.right == 0 and not narrowed)
    return visible.q_len <= LONGEST_QUERY and stand_at_the_end and not (narrowed and visible.left is not None)


def attend_few_rows(call: AttentionCall, aux: bool) -> ForwardResult:
    """The results of a call whose rows `are_few_rows`."""
    visible = call.visibility
    rows = Rows(
        call.q,
        call.k,
        call.v,
        visible.k_len,
        call.logits,
        visible.left,
        visible.key_lengths,
        visible.key_ranges,
    )
    return attend(rows, aux)


def attend(rows: Rows, aux: bool) -> ForwardResult:
    kind = _kind(rows, aux)
    if recorded.recorders:
        recorded.note(Exact("decode", kind.problem), _size(rows))
    return planned("decode", kind.problem, rows.q.device, lambda chosen: _launch(rows, aux, kind, chosen))


def _size(rows: Rows) -> Size:
    batch, q_heads, q_len, _ = rows.q.shape
    page = 0 if rows.block_table is None else rows.k.shape[2]
    left = min(rows.left or 0, rows.capacity)
    return Size(batch, q_heads, q_len, rows.capacity, rows.group, page=page, left=left)


def _kind(rows: Rows, aux: bool) -> Kind:
    _, query_scale, key_scale, key_bias, softcap, sinks = rows.logits
    vectors = (query_scale, key_scale, key_bias, sinks)
    masks = (rows.key_lengths, rows.key_ranges, rows.block_table, rows.query_lengths)
    key = (*forms_of(rows.q, rows.k, rows.v, *vectors, *masks), softcap is None, rows.left, aux)
    page = 0 if rows.block_table is None else rows.k.shape[2]
    return kind_of(key, lambda: (_problem(rows, aux), is_wide(rows.k, rows.v, page=page)))


def _launch(rows: Rows, aux: bool, kind: Kind, chosen: Plan) -> ForwardResult:
    batch, q_heads, q_len, _ = rows.q.shape
    splits = _splits(rows, chosen.config)
    tiles = -(-rows.group * q_len // chosen.config.block_m)
    joined = _allocate(rows, (batch, q_heads, q_len), rows.q.dtype, aux)
    parts = joined if splits == 1 else _allocate(rows, (batch, q_heads, q_len, splits), torch.float32, aux)
    arguments = _arguments(rows)
    arguments["results"], arguments["splits"], sinks = parts, splits, arguments["sinks_ptr"]
    arguments["sinks_ptr"] = sinks if splits == 1 else None
    chosen.launch((splits * tiles, rows.kv_heads, batch), arguments, kind.wide, kind)
    if splits > 1:
        arguments["parts"], arguments["results"], arguments["sinks_ptr"] = parts, joined, sinks
        combined = plan("decode_combine", kind.problem, rows.q.device)
        combined.launch((q_len, q_heads, batch), arguments, False, kind)
    return ForwardResult(joined.out, joined.lse, joined.max_logit, joined.entropy)


def _splits(rows: Rows, config: TileConfig) -> int:
    """Programs that share the keys of a sequence. They depend on shapes and the window, never on lengths or batch."""
    longest = rows.capacity
    if rows.left is not None:
        longest = min(longest, rows.left + rows.q.shape[2])
    return min(-(-longest // (config.block_n * config.split_blocks)), _MOST_SPLITS)


def _problem(rows: Rows, aux: bool) -> Problem:
    return Problem(
        head_dim=rows.q.shape[3],
        value_dim=rows.v.shape[3],
        dtype=rows.q.dtype,
        left=rows.left is not None,
        key_ranges=rows.key_ranges is not None,
        query_scale=rows.logits.query_scale is not None,
        key_scale=rows.logits.key_scale is not None,
        key_bias=rows.logits.key_bias is not None,
        grouped=rows.group > 1,
        softcap=rows.logits.softcap is not None,
        sinks=rows.logits.sinks is not None,
        aux=aux,
        sequences=rows.query_lengths is not None,
        block_table=rows.block_table is not None,
        packed_rows=padded_dim(rows.group * rows.q.shape[2]),
        aligned=are_aligned(rows.q, rows.k, rows.v),
        short=is_short(rows.q.shape[2], rows.capacity),
    )


def _allocate(rows: Rows, shape: tuple[int, ...], dtype: torch.dtype, aux: bool) -> Results:
    """Uninitialised results of every entry of a shape: a row, or a split of a row."""
    out = rows.q.new_empty((*shape, rows.v.shape[3]), dtype=dtype)
    lse = rows.q.new_empty(shape, dtype=torch.float32)
    max_logit, entropy = (torch.empty_like(lse), torch.empty_like(lse)) if aux else (None, None)
    return Results(out, None, lse, max_logit, entropy)


def _arguments(rows: Rows) -> Arguments:
    lengths, ranges, new = rows.key_lengths, rows.key_ranges, rows.query_lengths
    if lengths is not None and lengths.dtype not in (torch.int32, torch.int64):
        lengths = bounded(lengths, rows.capacity)
    length_words = 1 if lengths is None else lengths.dtype.itemsize // 4
    _, q_heads, q_len, _ = rows.q.shape
    return logit_arguments(rows.logits) | {
        "q": strided(rows.q),
        "k": strided(rows.k),
        "v": strided(rows.v),
        "key_lengths": None if lengths is None else lengths.contiguous().view(torch.int32),
        "key_ranges": None if ranges is None else bounded(ranges, rows.capacity).contiguous(),
        "query_lengths": None if new is None else new.int().contiguous(),
        "pages": pages_of(rows.block_table, rows.k.shape[0], rows.k.shape[2]),
        "left": None if rows.left is None else min(rows.left, rows.capacity),
        "q_len": q_len,
        "capacity": rows.capacity,
        "length_words": length_words,
        "q_heads": q_heads,
        "group": rows.group,
    }
