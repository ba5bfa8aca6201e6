"""Steps that all passes of attention share: from an AttentionCall to arguments, grid and launch. No policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError
from triton.tools.tensor_descriptor import TensorDescriptor

from ...core.call import LONGEST_QUERY, AttentionCall
from ...core.terms import Needs, choices, flags
from ...core.visibility import Visibility
from ...tuning import calls as recorded
from ...tuning.calls import Size
from ...tuning.config import (
    ROW_TERMS_ALIGNMENT,
    TILED_KERNELS,
    Problem,
    is_short,
    padded_dim,
)
from ...tuning.order import sections
from ...tuning.splits import splits_of_keys, splits_of_rows
from ...tuning.table import Exact
from .device import Grid, Layout
from .launch import (
    Plan,
    Specialisation,
    are_aligned,
    drop_config,
    forms_of,
    is_aligned,
    is_wide,
    kept_specialisation,
    logit_arguments,
    pages_of,
    plan,
    range_arguments,
    strided,
)
from .ranges import rows_of_key_blocks, seen_bytes, seen_keys
from .records import Arguments


def are_few_rows(call: AttentionCall) -> bool:
    """True where the decode kernel, whose programs share a row's keys, runs such a call instead of the forward kernel.

    Rows must stand at the end of the keys: causal rows do, and a lone row that attends to all keys. A relative bias
    counts from key Sk - 1 there, not from the last visible one.
    """
    visible = call.visibility
    if visible.mask is not None or visible.sequences is not None or call.dropout is not None:
        return False
    narrowed = visible.key_lengths is not None or visible.key_ranges is not None
    if narrowed and call.logits.relative_bias is not None:
        return False
    stand_at_the_end = visible.q_len == 1 or (visible.right == 0 and not narrowed)
    return visible.q_len <= LONGEST_QUERY and stand_at_the_end and not (narrowed and visible.left is not None)


def launch_kernel(
    kernel: str,
    specialisation: Specialisation,
    call: AttentionCall,
    available: Arguments,
    d_out: Tensor | None = None,
    in_splits: Callable[[Plan, Grid, Arguments, Specialisation, AttentionCall], None] | None = None,
) -> None:
    """A program for each block of rows, or of keys, of each head of each sequence; or several, `in_splits`.

    available   of all passes of a call, to which this one adds what its config decides
    """
    if recorded.recorders and kernel in TILED_KERNELS:
        recorded.note(Exact(kernel, specialisation.problem), size_of(call))

    device = call.q.device
    while True:
        chosen = plan(kernel, specialisation, device)
        try:
            layout = specialisation.layouts.get(chosen)
            if layout is None:
                layout = specialisation.layouts[chosen] = _layout(kernel, chosen, call, d_out)
            available.update(layout.arguments)
            if layout.descriptors:
                operands = {"q_descriptor": call.q, "k_descriptor": call.k, "v_descriptor": call.v}
                operands["d_out_descriptor"] = d_out
                make = _Descriptor if chosen.variant is None else chosen.variant.described
                for name, tile in layout.descriptors.items():
                    available[name] = make(operands[name], *tile)
            if call.visibility.key_ranges is not None and kernel == "grad_key_value":
                bounds = rows_of_key_blocks(call.visibility, available, chosen.config.block_n)
                available["row_bounds_ptr"] = bounds
            if in_splits is None or available["splits"] is None:
                chosen.launch(layout.grid, available, specialisation)
            else:
                in_splits(chosen, layout.grid, available, specialisation, call)
            return
        except (TritonError, RuntimeError) as error:
            drop_config(kernel, specialisation.problem, device, chosen, error)


def _layout(kernel: str, chosen: Plan, call: AttentionCall, d_out: Tensor | None) -> Layout:
    grid, arguments = _grid(kernel, chosen, call)
    if not chosen.config.descriptors:
        return Layout(grid, arguments | dict.fromkeys(chosen.descriptors), {})
    config, variant = chosen.config, chosen.variant
    tiles = {
        "q_descriptor": (call.q, config.block_m if variant is None else variant.rows),
        "k_descriptor": (call.k, config.block_n),
        "v_descriptor": (call.v, config.block_n),
        "d_out_descriptor": (d_out, config.block_m),
    }
    return Layout(grid, arguments, {name: _described(*tiles[name]) for name in chosen.descriptors})


def _described(tensor: Tensor, rows: int) -> tuple[list[int], list[int], list[int]]:
    """Shape, strides and tile, of `rows` rows of one (batch, head); an axis of one entry gets a legal stride."""
    shape, width = tensor.shape, 16 // tensor.dtype.itemsize
    strides = [stride if size > 1 else width for size, stride in zip(shape, tensor.stride(), strict=True)]
    return list(shape), [*strides[:3], 1], [1, 1, rows, padded_dim(shape[3])]


class _Descriptor(TensorDescriptor):
    """A descriptor of an aligned tensor, which leaves nothing to check."""

    def __post_init__(self) -> None:
        pass


def _grid(kernel: str, chosen: Plan, call: AttentionCall) -> tuple[Grid, Arguments]:
    """(blocks, heads, sequences) of row terms, else (size of a section, blocks, sections), and arguments with that.

    first_head          of `block.program_in_section`
    splits, part_rows   programs that share a block's work, which are as many blocks, and rows of each one's part; None
                        where there is one
    """
    visible, config, (sequences, rows, keys) = call.visibility, chosen.config, _sizes(call)
    if kernel == "row_terms":
        return (-(-aligned_rows(rows) // config.block_m), visible.q_heads, sequences), {"splits": None}
    bytes_of_row = (call.k.shape[3] + call.v.shape[3]) * call.k.dtype.itemsize
    if kernel == "grad_key_value":
        blocks, heads = -(-keys // config.block_n), visible.kv_heads * sequences
        read = rows * bytes_of_row * (visible.q_heads // visible.kv_heads)
    else:
        blocks, heads = -(-rows // config.block_m), visible.q_heads * sequences
        read = keys * bytes_of_row * visible.kv_heads // visible.q_heads
    size, count = sections(heads, read, chosen.target, config.l2_percent)
    splits, first_head = _splits(kernel, chosen, call), heads - size * count
    if splits == 1:
        return (size, blocks, count), {"first_head": first_head, "splits": None, "part_rows": None}
    part_rows = (call.q if kernel == "forward" else call.k).shape[:3].numel()
    return (size, blocks * splits, count), {"first_head": first_head, "splits": splits, "part_rows": part_rows}


def _splits(kernel: str, chosen: Plan, call: AttentionCall) -> int:
    """Splits of a call. A window narrows the keys of a block of rows, or the rows of a block of keys."""
    if call.visibility.invariant or "splits" not in chosen.names:
        return 1
    visible, config, (_, rows, keys) = call.visibility, chosen.config, _sizes(call)
    reach = rows + keys
    if visible.left is not None and visible.right is not None:
        reach = visible.left + visible.right + max(config.block_m, config.block_n)
    if kernel == "forward":
        return splits_of_keys(rows, min(keys, reach), config, chosen.target)
    group = visible.q_heads // visible.kv_heads
    causal = visible.right is not None and visible.left is None
    return splits_of_rows(min(rows, reach), keys, causal, group, visible.kv_heads, config, chosen.target)


def _sizes(call: AttentionCall) -> tuple[int, int, int]:
    """Sequences, and rows and keys of the longest one."""
    visible, sequences = call.visibility, call.visibility.sequences
    if sequences is None:
        return visible.batch, visible.q_len, visible.k_len
    return len(sequences.q_starts) - 1, sequences.longest_q, sequences.longest_k


def size_of(call: AttentionCall) -> Size:
    """The sizes of a call as `record` keeps them."""
    visible, (sequences, rows, keys) = call.visibility, _sizes(call)
    return Size(
        batch=sequences,
        heads=visible.q_heads,
        q_len=rows,
        k_len=keys,
        group=visible.q_heads // visible.kv_heads,
        q_total=0 if visible.sequences is None else visible.q_len,
        k_total=0 if visible.sequences is None else visible.k_len,
        page=0 if call.block_table is None else call.k.shape[2],
        left=min(visible.left or 0, rows + keys),
        right=min(visible.right or 0, rows + keys),
    )


def new_results(call: AttentionCall, like: Tensor, dtype: torch.dtype = torch.float32, fill: float = 0.0) -> Tensor:
    """A contiguous tensor for a kernel's results, with `fill` in it where rows may belong to no packed sequence.

    empty_like takes half of the time of new_empty, which reads a shape.
    """
    if call.visibility.sequences is None:
        return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
    return torch.full_like(like, fill, dtype=dtype, memory_format=torch.contiguous_format)


def aligned_rows(rows: int) -> int:
    return -(-rows // ROW_TERMS_ALIGNMENT) * ROW_TERMS_ALIGNMENT


def seen_scales(key_scale: Tensor, visible: Visibility) -> Tensor:
    """The key scale with 0 for keys that no row attends to, whose scales may be anything."""
    if visible.attends_to_every_key:
        return key_scale
    return torch.where(seen_keys(visible), key_scale, 0)


def largest(x: Tensor) -> Tensor:
    """The largest finite |x| over the last axis, contiguous; 1 where that is 0 or denormal: it divides."""
    largest = x.abs().nan_to_num(0.0, 0.0, 0.0).amax(-1)
    return torch.where(largest < torch.finfo(x.dtype).tiny, 1.0, largest).contiguous()


def problem_of(call: AttentionCall, d_out: Tensor | None = None, **asked: Any) -> Problem:
    """The `Problem` of a call: the parts that select code. `asked`: its fields that the call itself does not tell."""
    visible, terms = call.visibility, call.logits
    masks = ("right", "left", "key_lengths", "key_ranges", "mask", "sequences")
    found = Problem(
        call.q.shape[-1],
        call.v.shape[-1],
        call.q.dtype,
        **{name: getattr(visible, name) is not None for name in masks},
        **flags(terms),
        grouped=visible.q_heads != visible.kv_heads,
        dropout=call.dropout is not None,
        block_table=call.block_table is not None,
        aligned=_has_whole_vectors(call.q, call.v) if visible.invariant else are_aligned(call.q, call.k, call.v, d_out),
        short=is_short(*_sizes(call)[1:]),
        invariant=visible.invariant,
    )
    return replace(found, **asked)


def with_specialisation(
    call: AttentionCall, d_out: Tensor | None = None, needs: Needs | None = None, **asked: bool
) -> tuple[AttentionCall, Specialisation]:
    """The call and its specialisation. An operand is copied where that alone makes it aligned, as one at an odd offset.

    All kernels then load 16 bytes at a time, and are those of other calls. An expanded operand stays as it is, and so
    do pages, which hold more than the call's keys.
    """
    if not call.q.dtype == call.k.dtype == call.v.dtype:
        call = call.narrowed()
    if call.visibility.invariant:
        call = _with_one_layout(call)
    specialisation = _specialisation(call, d_out, needs, asked)
    if specialisation.problem.aligned:
        return call, specialisation
    names = ("q", "k", "v") if call.block_table is None else ("q",)
    operands = {name: getattr(call, name) for name in names}
    call = call.changed(**{name: x if 0 in x.stride() else aligned_copy(x) for name, x in operands.items()})
    return call, _specialisation(call, d_out, needs, asked)


def _specialisation(
    call: AttentionCall, d_out: Tensor | None, needs: Needs | None, asked: dict[str, bool]
) -> Specialisation:
    visible, sequences = call.visibility, call.visibility.sequences
    masks = (visible.key_lengths, visible.key_ranges, visible.mask)
    key = (
        *forms_of(call.q, call.k, call.v, d_out, *call.logits.tensors(), *masks, call.block_table),
        *choices(call.logits),
        call.dropout is None,
        visible.invariant,
        visible.left,
        visible.right,
        None if sequences is None else (sequences.longest_q, sequences.longest_k, len(sequences.q_starts)),
        (needs, *asked.values()),
    )

    def found() -> tuple[Problem, bool]:
        page = 0 if call.block_table is None else call.k.shape[2]
        return problem_of(call, d_out, **asked), is_wide(call.q, call.k, call.v, d_out, page=page)

    return kept_specialisation(key, found)


def aligned_copy(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where that alone is aligned, as of an expanded gradient."""
    if not _has_whole_vectors(tensor) or is_aligned(tensor):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)  # `contiguous` keeps a view at an odd offset


def _with_one_layout(call: AttentionCall) -> AttentionCall:
    """An invariant call with operands whose alignment, and so the code, follows from head dims and dtype."""
    if call.block_table is not None and not all(map(_has_one_layout, (call.k, call.v))):
        call = call.gathered()
    return call.changed(q=one_layout(call.q), k=one_layout(call.k), v=one_layout(call.v))


def one_layout(tensor: Tensor) -> Tensor:
    return tensor if _has_one_layout(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def _has_one_layout(tensor: Tensor) -> bool:
    return is_aligned(tensor) if _has_whole_vectors(tensor) else tensor.is_contiguous()


def _has_whole_vectors(*tensors: Tensor) -> bool:
    """True where rows of tensors [B, H, S, D] are multiples of 16 bytes."""
    for x in tensors:  # no generator: a call asks of all its tensors
        if x.shape[3] * x.dtype.itemsize % 16:
            return False
    return True


def call_arguments(call: AttentionCall) -> Arguments:
    """The arguments that the forward and both backward kernels share."""
    visible, dropout, sequences = call.visibility, call.dropout, call.visibility.sequences
    arguments = range_arguments(visible)
    mask = seen = None
    if visible.mask is not None:
        mask = _with_aligned_rows(visible.mask).expand(visible.batch, visible.q_heads, visible.q_len, visible.k_len)
        mask = strided(mask.view(torch.uint8))
    if visible.mask is not None or visible.key_ranges is not None:
        seen = seen_bytes(seen_keys(visible, arguments), visible.keys)
        if visible.invariant:  # loads of 8 bits before a product make Triton multiply in another order
            seen = seen.short()
    return {
        **arguments,
        **logit_arguments(call.logits),
        "q": strided(call.q),
        "k": strided(call.k),
        "v": strided(call.v),
        "mask": mask,
        "seen_ptr": seen,
        "q_starts": None if sequences is None else sequences.q_starts.contiguous(),
        "k_starts": None if sequences is None else sequences.k_starts.contiguous(),
        "dropout_ptr": None if dropout is None else dropout.state,
        "keep_scale": 1.0 if dropout is None else 1 / (1 - dropout.p),
        "keep_from": 0 if dropout is None else dropout.threshold - 2**31,
        "pages": None if call.block_table is None else pages_of(call.block_table, call.k.shape[0], call.k.shape[2]),
        "q_heads": visible.q_heads,
        "group": visible.q_heads // visible.kv_heads,
    }


def _with_aligned_rows(mask: Tensor) -> Tensor:
    """The mask, or a copy, with rows that begin at multiples of 16 bytes, which kernels load 16 bytes at a time.

    One code for masks of any length: Triton compiles another for strides of other divisibility.
    """
    width, (*outer, last) = mask.shape[3], mask.stride()
    if width == 1 or (last == 1 and not any(x % 16 for x in (mask.data_ptr(), *outer))):
        return mask
    return mask.new_empty((*mask.shape[:3], -(-width // 16) * 16))[..., :width].copy_(mask)
