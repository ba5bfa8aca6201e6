"""Steps that all passes of attention share: from an AttentionCall to arguments, grid and launch. No policy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.errors import TritonError
from triton.tools.tensor_descriptor import TensorDescriptor

from ...core.call import LONGEST_QUERY, AttentionCall
from ...core.eight_bit import EIGHT_BIT
from ...core.terms import PAIRS, TABLES, TERMS, Gradients, flags
from ...core.visibility import Visibility
from ...tuning import calls as recorded
from ...tuning.calls import Size
from ...tuning.config import SHORT, TILED_KERNELS, Problem, padded_dim
from ...tuning.table import Exact
from .combine import combine, parts_of
from .device import Grid
from .grids import Programs, Sizes
from .launch import (
    Plan,
    Specialisation,
    drop_config,
    forms_of,
    has_eight_bit,
    is_aligned,
    is_wide,
    kept_specialisation,
    plan,
)
from .ranges import seen_bytes, seen_keys
from .records import RECORDS, Arguments, LogitTerms, Masks, Strided, pages_of, scale_of, view_of


def are_few_rows(call: AttentionCall) -> bool:
    """True where the decode kernel, whose programs share a row's keys, runs such a call instead of the forward kernel.

    Rows must stand at the end of the keys: causal rows do, and a lone row that attends to all keys. A table by distance
    counts from key Sk - 1 there, not from the last visible one.
    """
    visible = call.visibility
    if visible.mask is not None or visible.sequences is not None or call.dropout is not None:
        return False
    narrowed = visible.key_lengths is not None or visible.key_ranges is not None
    if narrowed and any(getattr(call.terms, name) is not None for name in TABLES):
        return False
    stand_at_the_end = visible.q_len == 1 or (visible.right == 0 and not narrowed)
    return visible.q_len <= LONGEST_QUERY and stand_at_the_end and not (narrowed and visible.left is not None)


class Prepared(NamedTuple):
    """A call whose operands are as kernels want them.

    arguments   that its launches share: each adds its own to a copy
    d_out       of a backward
    tangents    of a tangent, and of its gradient
    """

    call: AttentionCall
    specialisation: Specialisation
    sizes: Sizes
    arguments: Mapping[str, Any]
    d_out: Tensor | None = None
    tangents: Gradients = Gradients()


def launch_kernel(
    kernel: str,
    prepared: Prepared,
    arguments: Arguments,
    programs: Callable[[Plan, Sizes], Programs],
    in_splits: Callable[[Plan, Grid, Arguments, Prepared], None] | None = None,
    of_plan: Callable[[Plan, Arguments, AttentionCall], Arguments] | None = None,
) -> None:
    """Launch with the kernel's plan, and again with another where its config fails.

    arguments   besides those that all launches of the call share
    programs    the kernel's, of `grids`
    in_splits   launches where several programs share a block's work, and joins the parts
    of_plan     makes arguments that depend on the plan
    """
    call, specialisation, sizes, shared, d_out, _ = prepared
    if recorded.recorders and kernel in TILED_KERNELS:
        recorded.note(Exact(kernel, specialisation.problem), size_of(call))

    device = call.q.device
    while True:
        chosen = plan(kernel, specialisation, device)
        try:
            grid, of_grid = _kept(programs, chosen, sizes)
            available = {**shared, **arguments, **of_grid}
            if chosen.descriptors:
                available.update(_descriptors(chosen, call, d_out))
            if of_plan is not None:
                available.update(of_plan(chosen, available, call))
            if in_splits is None or available["splits"] in (None, 1):
                chosen.launch(grid, available, specialisation)
            else:
                in_splits(chosen, grid, available, prepared)
            return
        except (TritonError, RuntimeError) as error:
            drop_config(kernel, specialisation.problem, device, chosen, error)


def launch_in_splits(chosen: Plan, grid: Grid, arguments: Arguments, ready: Prepared) -> None:
    """Launch a pass over rows whose keys are shared out among splits, and join their parts."""
    results, sinks = arguments["results"], arguments["sinks"]
    parts = parts_of(ready.call, results, arguments["splits"])
    arguments = arguments | {"results": parts, "sinks": None}
    chosen.launch(grid, arguments, ready.specialisation.in_splits)
    combine(ready.specialisation, parts, results, sinks)


@functools.lru_cache(maxsize=4096)
def _kept(programs: Callable[[Plan, Sizes], Programs], chosen: Plan, sizes: Sizes) -> Programs:
    return programs(chosen, sizes)


def _descriptors(chosen: Plan, call: AttentionCall, d_out: Tensor | None) -> Arguments:
    config, variant = chosen.config, chosen.variant
    operands = {
        "q_descriptor": (call.q, config.block_m if variant is None else variant.rows),
        "k_descriptor": (call.k, config.block_n),
        "v_descriptor": (call.v, config.block_n),
        "d_out_descriptor": (d_out, config.block_m),
    }
    make, found = _Descriptor if variant is None else variant.described, {}
    for name in chosen.descriptors:
        tensor, rows = operands[name]
        found[name] = make(tensor, *_described(tensor.shape, tensor.stride(), tensor.dtype.itemsize, rows))
    return found


@functools.lru_cache(maxsize=4096)
def _described(shape: torch.Size, strides: tuple[int, ...], itemsize: int, rows: int) -> tuple[list[int], ...]:
    """Shape, strides and tile, of `rows` rows of one (batch, head); an axis of one entry gets a legal stride."""
    legal = [stride if size > 1 else 16 // itemsize for size, stride in zip(shape, strides, strict=True)]
    return list(shape), [*legal[:3], 1], [1, 1, rows, padded_dim(shape[3])]


class _Descriptor(TensorDescriptor):
    """A descriptor of an aligned tensor, which leaves nothing to check."""

    def __post_init__(self) -> None:
        pass


def sizes_of(call: AttentionCall) -> Sizes:
    visible, sequences = call.visibility, call.visibility.sequences
    batch, q_len, k_len = visible.batch, visible.q_len, visible.k_len
    number, rows, keys = batch, q_len, k_len
    if sequences is not None:
        number, rows, keys = len(sequences.q_starts) - 1, sequences.longest_q, sequences.longest_k
    heads, window = (visible.q_heads, visible.kv_heads), (visible.left, visible.right)
    is_short = rows <= SHORT and keys <= SHORT
    return Sizes(batch, *heads, q_len, k_len, number, rows, keys, *window, visible.invariant, is_short)


def size_of(call: AttentionCall) -> Size:
    """The sizes of a call as `record` keeps them."""
    visible, sizes = call.visibility, sizes_of(call)
    reach = sizes.rows + sizes.keys
    return Size(
        batch=sizes.sequences,
        heads=sizes.q_heads,
        q_len=sizes.rows,
        k_len=sizes.keys,
        group=sizes.group,
        q_total=0 if visible.sequences is None else visible.q_len,
        k_total=0 if visible.sequences is None else visible.k_len,
        page=0 if call.block_table is None else call.k.shape[2],
        left=min(visible.left or 0, reach),
        right=min(visible.right or 0, reach),
    )


def new_results(call: AttentionCall, like: Tensor, dtype: torch.dtype = torch.float32, fill: float = 0.0) -> Tensor:
    """A contiguous tensor for a kernel's results, with `fill` in it where rows may belong to no packed sequence.

    empty_like takes half of the time of new_empty, which reads a shape.
    """
    if call.visibility.sequences is None:
        return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
    return torch.full_like(like, fill, dtype=dtype, memory_format=torch.contiguous_format)


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
    visible, sizes = call.visibility, sizes_of(call)
    masks = ("right", "left", "key_lengths", "key_ranges", "mask", "sequences")
    operands = (call.q, call.k, call.v, d_out)
    found = Problem(
        call.q.shape[-1],
        call.v.shape[-1],
        call.q.dtype,
        **{name: getattr(visible, name) is not None for name in masks},
        **flags(call.terms),
        grouped=visible.q_heads != visible.kv_heads,
        dropout=call.dropout is not None,
        block_table=call.block_table is not None,
        eight_bit=call.k.dtype == EIGHT_BIT,
        aligned=_has_whole_vectors(call.q, call.v) if visible.invariant else all(map(is_aligned, operands)),
        short=sizes.is_short,
        invariant=visible.invariant,
    )
    return replace(found, **asked)


def prepared(call: AttentionCall, d_out: Tensor | None = None, needs: Hashable = None, **asked: Any) -> Prepared:
    """The call as kernels want it. An operand is copied where that alone makes it aligned, as one at an odd offset.

    All kernels then load 16 bytes at a time, and are those of other calls. An expanded operand stays as it is, and so
    do pages, which hold more than the call's keys.

    needs   what selects code besides the call and `asked`
    """
    if not call.q.dtype == call.k.dtype == call.v.dtype:
        call = call.narrowed()
    if call.visibility.invariant:
        call = _with_one_layout(call)
    sizes = sizes_of(call)
    specialisation = specialisation_of(call, sizes, asked, d_out, needs)
    if not specialisation.problem.aligned:
        names = ("q", "k", "v") if call.block_table is None else ("q",)
        operands = {name: getattr(call, name) for name in names}
        call = call.changed(**{name: x if 0 in x.stride() else aligned_copy(x) for name, x in operands.items()})
        specialisation = specialisation_of(call, sizes, asked, d_out, needs)
    return Prepared(call, specialisation, sizes, call_arguments(call, d_out), d_out)


def specialisation_of(
    call: AttentionCall,
    sizes: Sizes,
    asked: Mapping[str, Any],
    d_out: Tensor | None = None,
    needs: Hashable = None,
) -> Specialisation:
    """The specialisation of a call, by all that selects code: lengths and numbers of sequences do not.

    asked   fields of the `Problem` that the call itself does not tell
    """
    visible, (q, k, v) = call.visibility, (call.q, call.k, call.v)
    page = 0 if call.block_table is None else k.shape[2]
    of_pairs, width = None, 0 if visible.mask is None else sizes.k_len
    for name in PAIRS:
        x = getattr(call.terms, name)
        if x is not None:
            width = max(width, sizes.k_len, x.shape[3])
    if width:
        shape = sizes.batch, sizes.q_heads, sizes.q_len, sizes.k_len
        if sizes.batch * sizes.q_heads * sizes.q_len * (width + 16) >= 2**31:
            of_pairs = *shape, width  # a mask's copy, or a gradient of pairs, may have strides of 64 bits
    key = (
        *forms_of(call.terms, q, k, v, d_out, visible.mask),
        q.shape[3],
        v.shape[3],
        visible.left is None,
        visible.right is None,
        visible.key_lengths is None,
        visible.key_ranges is None,
        visible.sequences is None,
        visible.invariant,
        call.dropout is None,
        sizes.q_heads == sizes.kv_heads,
        sizes.is_short,
        page > 0,
        page > 1024 and is_wide(k, v, page=page),
        of_pairs,
        needs,
        *asked.values(),
    )
    return kept_specialisation(key, lambda: (problem_of(call, d_out, **asked), is_wide(q, k, v, d_out, page=page)))


def aligned_copy(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where that alone is aligned, as of an expanded gradient."""
    if is_aligned(tensor) or not _has_whole_vectors(tensor):
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


def call_arguments(call: AttentionCall, d_out: Tensor | None) -> Mapping[str, Any]:
    """The arguments that the forward and both backward kernels share."""
    visible, dropout, sequences = call.visibility, call.dropout, call.visibility.sequences
    view = view_of(visible)
    mask = seen = None
    if visible.mask is not None:
        mask = _with_aligned_rows(visible.mask).expand(visible.batch, visible.q_heads, visible.q_len, visible.k_len)
        mask = Strided(mask.view(torch.uint8), *mask.stride())
    if visible.mask is not None or visible.key_ranges is not None:
        seen = seen_bytes(seen_keys(visible, view), visible.keys)
        if visible.invariant:  # loads of 8 bits before a product make Triton multiply in another order
            seen = seen.short()
    q_starts = k_starts = None
    if sequences is not None:
        q_starts, k_starts = sequences.q_starts.contiguous(), sequences.k_starts.contiguous()
    return {
        **operand_arguments(call),
        "masks": Masks(view.key_lengths, view.key_ranges, q_starts, k_starts, None, mask, seen),
        "left": view.left,
        "right": view.right,
        "k_len": visible.k_len,
        "d_out": None if d_out is None else Strided(d_out, *d_out.stride()),
        "dropout_ptr": None if dropout is None else dropout.state,
        "keep_scale": 1.0 if dropout is None else 1 / (1 - dropout.p),
        "keep_from": 0 if dropout is None else dropout.threshold - 2**31,
    }


def operand_arguments(call: AttentionCall) -> Arguments:
    """The arguments that all kernels of attention share: None for terms that are not there."""
    visible, table, (q, k, v), terms = call.visibility, call.block_table, (call.q, call.k, call.v), call.terms
    if k.dtype == EIGHT_BIT and not has_eight_bit(k.device):
        k, v = k.view(torch.int8), v.view(torch.int8)
    of_logits: list[Any] = []
    for number, form in _OF_LOGITS:  # no comprehension: each is a call before Python 3.12
        value = terms[number]
        of_logits.append(None if value is None or value is False else RECORDS[form](value))
    sinks, softcap = terms.sinks, terms.softcap
    distances = terms.relative_scale if terms.relative_bias is None else terms.relative_bias
    return {
        "q": Strided(q, *q.stride()),
        "k": Strided(k, *k.stride()),
        "v": Strided(v, *v.stride()),
        "terms": LogitTerms(*of_logits),
        "scale": float(terms.scale),
        "softcap": None if softcap is None else float(softcap),
        "sinks": None if sinks is None else scale_of(sinks),
        "extent": None if distances is None else distances.shape[3],
        "relative_right": None if distances is None else terms.relative_right,
        "pages": None if table is None else pages_of(table, call.k.shape[0], call.k.shape[2]),
        "q_len": visible.q_len,
        "q_heads": visible.q_heads,
        "group": visible.q_heads // visible.kv_heads,
    }


_OF_LOGITS = [(number, term.form) for number, term in enumerate(TERMS) if term.name in LogitTerms._fields]


def _with_aligned_rows(mask: Tensor) -> Tensor:
    """The mask, or a copy, with rows that begin at multiples of 16 bytes, which kernels load 16 bytes at a time.

    One code for masks of any length: Triton compiles another for strides of other divisibility.
    """
    width, (*outer, last) = mask.shape[3], mask.stride()
    if width == 1 or (last == 1 and not any(x % 16 for x in (mask.data_ptr(), *outer))):
        return mask
    return mask.new_empty((*mask.shape[:3], -(-width // 16) * 16))[..., :width].copy_(mask)
