"""transformers' masks as ranges of keys, and as arguments of `tritonattn.attention`.

transformers describes a mask by a closure over (batch, head, query, key) indices and a 2-D padding mask, once
a forward pass and layer type. The closures that models use are ranges of keys for every query row, so the
mask becomes int32 [B, 1, Q, 2]: row i attends to the keys [lo, hi). That takes O(B Q) instead of O(B Q K) and gives
the number of keys of each row. It has four axes, so transformers passes it on untouched, through generate(), a
static cache and torch.compile alike. Other masks (an unknown closure, padding with holes; while compiling, any
closure but plain causal and bidirectional) become transformers' dense bool mask, [B, 1, Q, K].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import masking_utils

from ..core.pair_biases import mask_arguments
from ..core.private_names import deferred
from ..core.visibility import Visibility
from .first_use import is_waiting
from .settings import layer_scaling

_assert_async = deferred("torch._assert_async")

_FAR = 2**40  # beyond any key
_VISIBLE = {"causal", "window", "key_ranges", "mask"}
STATED = "_tritonattn_states_masks"  # entry of a config whose models' is_causal flags may be wrong

_COMPILED_HOLES = (
    "tritonattn: attention_mask: expected padding on the left or right, got masked keys between visible ones, for which"
    " torch.compile cannot switch to a dense mask: do not compile"
)


class Bounds(NamedTuple):
    """Keys lo <= j < hi for every row, int64 [B or 1, Q]."""

    lo: Tensor
    hi: Tensor

    @classmethod
    def open(cls, position: Tensor) -> Bounds:
        """All keys, for rows at position [B or 1, Q]."""
        return cls(torch.full_like(position, -_FAR), torch.full_like(position, _FAR))

    def within(self, other: Bounds) -> Bounds:
        return Bounds(torch.maximum(self.lo, other.lo), torch.minimum(self.hi, other.hi))


def key_range_mask(**arguments: Any) -> Tensor | None:
    """The mask function for AttentionMaskInterface, with the arguments of transformers' `sdpa_mask`.

    While compiling, padding with holes fails an assertion.

    Returns:
        None if causal=True, or no mask, describes the visible keys; int32 [B, 1, Q, 2] if every row attends to a range
        of keys; transformers' dense bool [B, 1, Q, K] otherwise.
    """
    kv_length, key_offset = arguments["kv_length"], arguments.get("kv_offset", 0)
    function = arguments.get("mask_function", masking_utils.causal_mask_function)
    position, is_aligned = _positions(arguments, kv_length, key_offset)
    bounds = None if arguments.get("use_vmap") else _bounds(function, position[None])
    if bounds is None:
        return _dense(arguments)
    padded, padding = _padding_state(arguments.get("attention_mask"), kv_length, key_offset)
    if padded == "holes":
        return _dense(arguments)
    if padded == "none" and _is_implied(arguments, function, is_aligned):
        return None
    bounds = bounds if padding is None else bounds.within(padding)
    shape = (arguments["batch_size"], position.shape[0])
    lo, hi = ((side - key_offset).clamp(0, kv_length).expand(shape) for side in bounds)
    return torch.stack([torch.minimum(lo, hi), hi], dim=-1)[:, None].to(torch.int32)


def _positions(arguments: dict[str, Any], kv_length: int, key_offset: int | Tensor) -> tuple[Tensor, bool]:
    """Positions of the queries in the text [Q], and whether the last is known, unread, to stand at the last key."""
    position = arguments.get("cache_position")  # up to transformers 5.0
    if position is not None:
        return position, isinstance(key_offset, int) and key_offset == 0 and position.shape[0] == kv_length
    q_length, q_offset = arguments["q_length"], arguments.get("q_offset", 0)
    position = torch.arange(q_length, device=arguments.get("device", "cpu")) + q_offset
    is_known = isinstance(q_offset, int) and isinstance(key_offset, int)
    return position, is_known and q_offset + q_length == key_offset + kv_length


def _is_implied(arguments: dict[str, Any], function: Callable, is_aligned: bool) -> bool:
    """True where the module's is_causal flag alone describes the visible keys, bottom-right aligned."""
    size = arguments.get("local_size")
    if is_waiting() or getattr(arguments.get("config"), STATED, False):
        return False
    if size is not None and arguments["kv_length"] > size:
        return False
    names = _names(function)
    if names <= {"bidirectional_mask_function", "sliding_window_bidirectional_overlay"}:
        return arguments.get("allow_is_bidirectional_skip", False)
    is_causal = names <= {"causal_mask_function", "sliding_window_overlay"}
    return arguments.get("allow_is_causal_skip", True) and is_aligned and is_causal


def _padding_state(mask: Tensor | None, kv_length: int, key_offset: int | Tensor) -> tuple[str, Bounds | None]:
    """Classify padding: ("none" | "range" | "holes", the range of unmasked keys [B, 1]).

    Reads the mask on the host, once, except while compiling.
    """
    if mask is None:
        return "none", None
    key = torch.arange(kv_length, device=mask.device) + key_offset
    known = mask.shape[-1]
    visible = mask.bool()[:, key.clamp(max=known - 1)] & (key < known)  # [B, K]
    count = visible.sum(-1)
    first = visible.int().argmax(-1)
    end = torch.where(count > 0, kv_length - visible.flip(-1).int().argmax(-1), first)
    bounds = Bounds(*((side + key_offset)[:, None] for side in (first, end)))
    whole, ranges = (count == kv_length).all(), (count == end - first).all()
    if torch.compiler.is_compiling():
        _assert_async(ranges, _COMPILED_HOLES)
        return "range", bounds
    whole, ranges = torch.stack([whole, ranges]).tolist()
    return ("none" if whole else "range" if ranges else "holes"), bounds


def _dense(arguments: dict[str, Any]) -> Tensor:
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = masking_utils.sdpa_mask(**{**arguments, **skips})
    assert mask is not None  # it is None only by a skip
    return mask


def _name(function: Callable) -> str:
    """The name of a mask function of transformers, or of the function that made a closure; "" for others."""
    for name in ("causal_mask_function", "bidirectional_mask_function"):
        if function is getattr(masking_utils, name, None):
            return name
    # torch.compile cannot read the variables of a closure that it traces.
    if torch.compiler.is_compiling() or getattr(function, "__module__", None) != masking_utils.__name__:
        return ""
    return function.__qualname__.split(".")[0]


def _captured(function: Callable) -> tuple[Any, ...]:
    """The variables of a closure of transformers, in alphabetical order of their names."""
    return tuple(cell.cell_contents for cell in function.__closure__ or ())


def _names(function: Callable) -> set[str]:
    name = _name(function)
    return set().union(*map(_names, _captured(function)[0])) if name == "and_masks" else {name}


def _bounds(function: Callable, position: Tensor) -> Bounds | None:
    """The keys that a mask function shows to rows at position [B or 1, Q]; None if they may be no range."""
    name, total = _name(function), Bounds.open(position)
    if name == "bidirectional_mask_function":
        return total
    if name == "causal_mask_function":
        return Bounds(total.lo, position + 1)  # torch 2.8 traces no `_replace`
    if name != "and_masks":
        return _RULES[name](position, *_captured(function)) if name in _RULES else None
    # Positions restart in every packed document, so remapped bounds hold only inside the row's document.
    if _REMAPPED in (names := _names(function)) and "packed_sequence_mask_function" not in names:
        return None
    for part in _captured(function)[0]:
        bounds = _remapped(part, position) if _name(part) == _REMAPPED else _bounds(part, position)
        if bounds is None:
            return None
        total = total.within(bounds)
    return total


def _remapped(function: Callable, position: Tensor) -> Bounds | None:
    inner, position_ids = _captured(function)
    inside = position_ids.gather(1, position.expand(position_ids.shape[0], -1))  # [B, Q], steps of 1 in a document
    bounds = _bounds(inner, inside)
    return None if bounds is None else Bounds(*(side + position - inside for side in bounds))


def _chunk(position: Tensor, chunk_size: int, left_padding: Tensor | None = None) -> Bounds:
    start = 0 if left_padding is None else left_padding.to(position.device)[:, None]
    lo = (position - start).div(chunk_size, rounding_mode="floor") * chunk_size + start
    return Bounds(lo, lo + chunk_size)


def _packed(position: Tensor, documents: Tensor) -> Bounds:
    documents = documents.contiguous()  # [B, K], never falling along the keys
    document = documents.gather(1, position.expand(documents.shape[0], -1))
    return Bounds(torch.searchsorted(documents, document), torch.searchsorted(documents, document, right=True))


_REMAPPED = "remap_positions_for_packed_sequence"
# Bounds of the closures that these functions of transformers make, from positions and the captured variables.
_RULES: dict[str, Callable[..., Bounds]] = {
    "sliding_window_overlay": lambda position, size: Bounds(position - size + 1, Bounds.open(position).hi),
    "sliding_window_bidirectional_overlay": lambda position, size: Bounds(position - size, position + size + 1),
    "chunked_overlay": _chunk,
    "packed_sequence_mask_function": _packed,
}


def visible_arguments(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments causal, window, key_ranges, mask and bias of `tritonattn.attention`.

    mask is int32 [B, 1, Q, 2] from `key_range_mask`. If only some layers of a model are patched, it is the 4-D mask
    of "sdpa" (bool) or "eager" (0 and very negative; other numbers are a bias).

    Raises ValueError or TypeError for any other mask.
    """
    if mask is None:
        return _implied(module, query, key, kwargs)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        got = f"{mask.dim()}-D" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask: expected a 4-D tensor from the mask function of tritonattn, sdpa or eager, got {got};"
            " if only some layers are patched, the model's implementation has to be one of these"
        )
    if mask.dtype == torch.int32:
        if mask.shape[-1] != 2:
            raise ValueError(f"attention_mask: expected key ranges [B, 1, Q, 2], got int32 {list(mask.shape)}")
        return {"key_ranges": mask.expand(query.shape[0], -1, -1, -1)}
    return mask_arguments("attention_mask", mask[..., : key.shape[-2]])


def visibility_of(query: Tensor, key: Tensor, arguments: dict[str, Any]) -> Visibility:
    """The keys that each row attends to, from the arguments of a call of `tritonattn.attention`."""
    return Visibility.of(query, key, **{name: arguments[name] for name in arguments.keys() & _VISIBLE})


def is_packed(mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """True for a call of continuous batching: rows and keys are packed request after request, without a mask."""
    return mask is None and all(kwargs.get(name) is not None for name in ("read_index", "cu_seq_lens_q"))


def packed_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The sequences and visibility arguments of `tritonattn.attention_varlen`, for a call of continuous batching.

    A request's rows are its last ones, and its keys begin up to `sliding_window` - 1 keys before them.
    """
    size = kwargs.get("sliding_window")
    return {
        "cu_seqlens_q": kwargs["cu_seq_lens_q"],
        "cu_seqlens_k": kwargs["cu_seq_lens_k"],
        "max_seqlen_q": kwargs["max_length_q"],
        "max_seqlen_k": kwargs["max_length_k"],
        "causal": True,
        "window": None if size is None else (size - 1, None),
    }


def _implied(module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Visibility without a mask: from the module's is_causal flag, packed documents and the window."""
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    source = _mask_source(module)
    if source == "eager":
        return {}  # eager attention hides nothing but by its mask
    window = _window(causal, query, key, kwargs)
    if kwargs.get("cu_seq_lens_q") is not None:
        ranges = _document_ranges(query.shape[2], kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"], causal)
        return {"key_ranges": ranges.expand(query.shape[0], -1, -1), **window}
    if causal and source == "sdpa" and 1 < query.shape[2] < key.shape[2]:
        # The prefill of an empty static cache: row i attends to the keys j <= i.
        end = torch.arange(1, query.shape[2] + 1, device=query.device, dtype=torch.int32)
        return {"key_ranges": torch.stack([torch.zeros_like(end), end], -1).expand(query.shape[0], -1, -1)}
    return {"causal": causal and query.shape[2] > 1, **window}


def _mask_source(module: nn.Module) -> str | None:
    """The attention implementation whose mask function made the masks; None for tritonattn's."""
    layer = layer_scaling(module)
    config = getattr(module, "config", None) if layer is None else layer.shared
    name = getattr(config, "_attn_implementation", None)
    return "sdpa" if "/" in (name or "") else name  # transformers registers a kernel of the hub with sdpa's masks


def _window(causal: bool, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    size = kwargs.get("sliding_window")
    if size is None or size >= key.shape[2]:
        return {}
    packed = kwargs.get("cu_seq_lens_q") is not None
    if not causal or (packed and query.shape[2] != key.shape[2]):
        raise NotImplementedError(
            "sliding_window: without a mask, expected causal attention, with as many queries as keys if documents are"
            f" packed, got causal={causal}, {query.shape[2]} queries and {key.shape[2]} keys"
        )
    return {"window": (size - 1, None)}


def _document_ranges(q_length: int, q_ends: Tensor, k_ends: Tensor, causal: bool) -> Tensor:
    """Key ranges of packed documents, int32 [1, Q, 2]: document d attends to [k_ends[d], k_ends[d + 1]).

    q_ends and k_ends int [documents + 1] start at 0 (`cu_seq_lens_q`, `cu_seq_lens_k`); causal is
    bottom-right in every document; rows past the last document attend to nothing.
    """
    row = torch.arange(q_length, device=q_ends.device)
    document = torch.searchsorted(q_ends.contiguous(), row, right=True) - 1
    inside = document < q_ends.shape[0] - 1
    document = document.clamp(max=max(q_ends.shape[0] - 2, 0))
    lo, hi = k_ends[document].long(), k_ends[document + 1].long()
    if causal:
        hi = torch.minimum(hi, hi - q_ends[document + 1] + row + 1)
    return torch.stack([lo, torch.where(inside, hi, lo)], dim=-1)[None].to(torch.int32)
