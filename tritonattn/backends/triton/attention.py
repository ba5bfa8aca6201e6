"""What the passes of attention share: from an AttentionCall to a kernel's arguments, grid and launch. No policy."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...core.call import AttentionCall, Needs
from ...core.visibility import Visibility
from ...tuning import calls as recorded
from ...tuning.config import (
    ROW_TERMS_ALIGNMENT,
    TILED_KERNELS,
    Problem,
    TileConfig,
    is_short,
    padded_dim,
)
from ...tuning.order import heads_of_section
from ...tuning.table import Exact
from .device import Grid
from .launch import (
    Arguments,
    Kind,
    Plan,
    are_aligned,
    forms_of,
    is_wide,
    kind_of,
    logit_arguments,
    pages_of,
    planned,
    strided,
)
from .ranges import range_arguments, rows_of_key_blocks, seen_bytes, seen_keys
from .sizes import lengths_of, sequences_of, size_of


def launch_kernel(
    kernel: str, kind: Kind, call: AttentionCall, available: Arguments, d_out: Tensor | None = None
) -> None:
    """A program for each block of rows, or of keys, of each head of each sequence."""
    if recorded.recorders and kernel in TILED_KERNELS:
        recorded.note(Exact(kernel, kind.problem), size_of(call))

    def launches(chosen: Plan) -> None:
        of_config = _descriptors(chosen, call, d_out)
        if kernel == "grad_key_value":
            of_config["row_bounds_ptr"] = rows_of_key_blocks(call.visibility, available, chosen.config.block_n)
        chosen.launch(_grid(kernel, chosen, call), available | of_config, kind.wide, kind)

    planned(kernel, kind.problem, call.q.device, launches)


def _grid(kernel: str, chosen: Plan, call: AttentionCall) -> Grid:
    """(blocks, heads, sequences) of row terms, else (heads of a section, blocks, sections)."""
    visible, blocks, sequences = call.visibility, _blocks(kernel, chosen.config, call), sequences_of(call)
    if kernel == "row_terms":
        return blocks, visible.q_heads, sequences
    rows, keys = lengths_of(call)
    bytes_of_row = (call.k.shape[3] + call.v.shape[3]) * call.k.dtype.itemsize
    if kernel == "grad_key_value":
        count, read = visible.kv_heads * sequences, rows * bytes_of_row * (visible.q_heads // visible.kv_heads)
    else:
        count, read = visible.q_heads * sequences, keys * bytes_of_row * visible.kv_heads // visible.q_heads
    section = heads_of_section(count, read, chosen.target, chosen.config.l2_percent)
    return section, blocks, count // section


def _blocks(kernel: str, config: TileConfig, call: AttentionCall) -> int:
    """Blocks of rows, or of keys, of the longest sequence."""
    rows, keys = lengths_of(call)
    if kernel == "grad_key_value":
        return -(-keys // config.block_n)
    return -(-(aligned_rows(rows) if kernel == "row_terms" else rows) // config.block_m)


def new_results(call: AttentionCall, shape: tuple[int, ...], dtype: torch.dtype, fill: float = 0.0) -> Tensor:
    """A contiguous tensor for a kernel's results, with `fill` in it where rows may belong to no packed sequence."""
    if call.visibility.sequences is None:
        return call.q.new_empty(shape, dtype=dtype)
    return call.q.new_full(shape, fill, dtype=dtype)


def aligned_rows(rows: int) -> int:
    return -(-rows // ROW_TERMS_ALIGNMENT) * ROW_TERMS_ALIGNMENT


def seen_scales(key_scale: Tensor, visible: Visibility) -> Tensor:
    """The key scale with 0 for keys that no row sees, whose scales may be anything."""
    if visible.sees_every_key:
        return key_scale
    return torch.where(seen_keys(visible), key_scale, 0)


def largest(x: Tensor) -> Tensor:
    """The largest finite |x| over the last axis, contiguous; 1 where that is 0 or denormal: it divides."""
    largest = x.abs().nan_to_num(0.0, 0.0, 0.0).amax(-1)
    return torch.where(largest < torch.finfo(x.dtype).tiny, 1.0, largest).contiguous()


def problem_of(call: AttentionCall, d_out: Tensor | None = None, **asked: bool) -> Problem:
    """The `Problem` of a call: the parts that select code. `asked`: its fields that say which results are asked for."""
    visible = call.visibility
    return Problem(
        head_dim=call.q.shape[-1],
        value_dim=call.v.shape[-1],
        dtype=call.q.dtype,
        right=visible.right is not None,
        left=visible.left is not None,
        key_lengths=visible.key_lengths is not None,
        key_ranges=visible.key_ranges is not None,
        mask=visible.mask is not None,
        query_scale=call.logits.query_scale is not None,
        key_scale=call.logits.key_scale is not None,
        key_bias=call.logits.key_bias is not None,
        grouped=visible.q_heads != visible.kv_heads,
        softcap=call.logits.softcap is not None,
        sinks=call.logits.sinks is not None,
        dropout=call.dropout is not None,
        sequences=visible.sequences is not None,
        block_table=call.block_table is not None,
        aligned=_has_whole_vectors(call.q, call.v) if call.invariant else are_aligned(call.q, call.k, call.v, d_out),
        short=is_short(*lengths_of(call)),
        invariant=call.invariant,
        **asked,
    )


def _descriptors(chosen: Plan, call: AttentionCall, d_out: Tensor | None) -> Arguments:
    """The descriptors that a kernel takes, or None for each."""
    config = chosen.config
    if not config.descriptors:
        return dict.fromkeys(chosen.descriptors)
    tiles = {
        "q_descriptor": (call.q, config.block_m),
        "k_descriptor": (call.k, config.block_n),
        "v_descriptor": (call.v, config.block_n),
        "d_out_descriptor": (d_out, config.block_m),
    }
    return {name: _descriptor(*tiles[name]) for name in chosen.descriptors}


def of_kind(
    call: AttentionCall, d_out: Tensor | None = None, needs: Needs | None = None, **asked: bool
) -> tuple[AttentionCall, Kind]:
    """The call and its kind. An operand is copied where that alone makes it aligned, as a view at an odd offset.

    All kernels then load 16 bytes at a time, and are those of other calls. An expanded operand stays as it is, and so
    do pages, which hold more than the call's keys.
    """
    call = _with_one_layout(call)
    kind = _kind(call, d_out, needs, asked)
    if not kind.problem.aligned:
        names = ("q", "k", "v") if call.block_table is None else ("q",)
        operands = {name: getattr(call, name) for name in names}
        call = replace(call, **{name: x if 0 in x.stride() else aligned_copy(x) for name, x in operands.items()})
        kind = _kind(call, d_out, needs, asked)
    return call, kind


def _kind(call: AttentionCall, d_out: Tensor | None, needs: Needs | None, asked: dict[str, bool]) -> Kind:
    visible, sequences = call.visibility, call.visibility.sequences
    _, query_scale, key_scale, key_bias, softcap, sinks = call.logits
    vectors = (query_scale, key_scale, key_bias, sinks)
    masks = (visible.key_lengths, visible.key_ranges, visible.mask)
    key = (
        *forms_of(call.q, call.k, call.v, d_out, *vectors, *masks, call.block_table),
        softcap is None,
        call.dropout is None,
        visible.invariant,
        visible.left,
        visible.right,
        None if sequences is None else lengths_of(call),
        (needs, *asked.values()),
    )
    page = 0 if call.block_table is None else call.k.shape[2]
    return kind_of(key, lambda: (problem_of(call, d_out, **asked), is_wide(call.q, call.k, call.v, d_out, page=page)))


def aligned_copy(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where that alone is aligned, as of an expanded gradient."""
    if not _has_whole_vectors(tensor) or are_aligned(tensor):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)  # `contiguous` keeps a view at an odd offset


def _with_one_layout(call: AttentionCall) -> AttentionCall:
    """The call; where `invariant`, with operands whose alignment, and so the code, follows from head dims and dtype."""
    if not call.invariant:
        return call
    if call.block_table is not None and not all(map(_has_one_layout, (call.k, call.v))):
        call = call.gathered()
    return replace(call, q=one_layout(call.q), k=one_layout(call.k), v=one_layout(call.v))


def one_layout(tensor: Tensor) -> Tensor:
    return tensor if _has_one_layout(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def _has_one_layout(tensor: Tensor) -> bool:
    return are_aligned(tensor) if _has_whole_vectors(tensor) else tensor.is_contiguous()


def _has_whole_vectors(*tensors: Tensor) -> bool:
    """Whether rows of tensors [B, H, S, D] are multiples of 16 bytes."""
    return all(x.shape[3] * x.dtype.itemsize % 16 == 0 for x in tensors)


class _Descriptor(TensorDescriptor):
    """A descriptor of an aligned tensor, which leaves nothing to check."""

    def __post_init__(self) -> None:
        pass


def _descriptor(tensor: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of tiles of `rows` rows of one (batch, head); an axis of one entry gets a legal stride."""
    return _Descriptor(tensor, *_described(tensor.shape, tensor.stride(), tensor.dtype.itemsize, rows))


@functools.lru_cache(maxsize=4096)
def _described(
    shape: torch.Size, strides: tuple[int, ...], itemsize: int, rows: int
) -> tuple[list[int], list[int], list[int]]:
    """Shape, strides and tile of a descriptor, which nothing changes."""
    legal = [stride if size > 1 else 16 // itemsize for size, stride in zip(shape, strides, strict=True)]
    return list(shape), [*legal[:3], 1], [1, 1, rows, padded_dim(shape[3])]


def call_arguments(call: AttentionCall) -> Arguments:
    """The arguments that the forward and both backward kernels share."""
    visible, dropout = call.visibility, call.dropout
    arguments = _visibility_arguments(call) | logit_arguments(call.logits)
    return arguments | {
        "q": strided(call.q),
        "k": strided(call.k),
        "v": strided(call.v),
        "dropout_ptr": None if dropout is None else dropout.state,
        "keep_scale": 1.0 if dropout is None else 1 / (1 - dropout.p),
        "keep_from": 0 if dropout is None else dropout.threshold - 2**31,
        "pages": pages_of(call.block_table, call.k.shape[0], call.k.shape[2]),
        "q_heads": visible.q_heads,
        "group": visible.q_heads // visible.kv_heads,
    }


def _visibility_arguments(call: AttentionCall) -> Arguments:
    visible = call.visibility
    arguments = range_arguments(visible)
    mask = seen = q_starts = k_starts = None
    if visible.sequences is not None:
        q_starts, k_starts = visible.sequences.q_starts.contiguous(), visible.sequences.k_starts.contiguous()
    if visible.mask is not None:
        mask = _with_aligned_rows(visible.mask).expand(visible.batch, visible.q_heads, visible.q_len, visible.k_len)
        mask = mask.view(torch.uint8)
    if visible.mask is not None or visible.key_ranges is not None:
        seen = seen_bytes(seen_keys(visible, arguments), visible.keys)
        if call.invariant:  # loads of 8 bits before a product make Triton multiply in another order
            seen = seen.short()
    return arguments | {"mask": strided(mask), "seen_ptr": seen, "q_starts": q_starts, "k_starts": k_starts}


def _with_aligned_rows(mask: Tensor) -> Tensor:
    """The mask, or a copy, with rows that begin at multiples of 16 bytes, which kernels load 16 bytes at a time.

    One code for masks of any length: Triton compiles another for strides of other divisibility.
    """
    width, (*outer, last) = mask.shape[3], mask.stride()
    if width == 1 or (last == 1 and not any(x % 16 for x in (mask.data_ptr(), *outer))):
        return mask
    return mask.new_empty((*mask.shape[:3], -(-width // 16) * 16))[..., :width].copy_(mask)
