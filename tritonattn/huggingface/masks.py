"""transformers' masks as ranges of keys.

transformers describes a mask by a closure over (batch, head, query, key) indices and a 2-D padding mask, once
a forward pass and layer type. The closures that models use are ranges of keys for every query row, so the
mask becomes int32 [B, 1, Q, 2]: row i attends to the keys [lo, hi). That takes O(B Q) instead of O(B Q K) and gives
the number of keys of each row. It has four axes, so transformers passes it on untouched, through generate(), a
static cache and torch.compile alike. Other masks (an unknown closure, padding with holes; while compiling, any
closure but plain causal and bidirectional) become transformers' dense bool mask, [B, 1, Q, K].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils

from .first_use import is_waiting

_FAR = 2**40  # beyond any key
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


@dataclass(frozen=True)
class MaskRequest:
    """The arguments of a mask function, by the names of transformers 4.57 and 5.24.

    position     [Q], positions of the queries in the text
    key_offset   the position of the first key
    aligned      whether the last query is known, without reading a tensor, to stand at the last key
    """

    batch_size: int
    q_length: int
    kv_length: int
    position: Tensor
    key_offset: int | Tensor
    aligned: bool
    mask_function: Callable
    padding: Tensor | None
    local_size: int | None
    may_skip_causal: bool
    may_skip_bidirectional: bool
    stated: bool

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> MaskRequest:
        """Read the keyword arguments: `cache_position` up to 5.0, `q_length` and `q_offset` after."""
        kv_length, key_offset = arguments["kv_length"], arguments.get("kv_offset", 0)
        position = arguments.get("cache_position")
        if position is None:
            q_length, q_offset = arguments["q_length"], arguments.get("q_offset", 0)
            position = torch.arange(q_length, device=arguments.get("device", "cpu")) + q_offset
            known = isinstance(q_offset, int) and isinstance(key_offset, int)
            aligned = known and q_offset + q_length == key_offset + kv_length
        else:
            q_length = position.shape[0]
            aligned = isinstance(key_offset, int) and key_offset == 0 and q_length == kv_length
        return cls(
            batch_size=arguments["batch_size"],
            q_length=q_length,
            kv_length=kv_length,
            position=position,
            key_offset=key_offset,
            aligned=aligned,
            mask_function=arguments.get("mask_function", masking_utils.causal_mask_function),
            padding=arguments.get("attention_mask"),
            local_size=arguments.get("local_size"),
            may_skip_causal=arguments.get("allow_is_causal_skip", True),
            may_skip_bidirectional=arguments.get("allow_is_bidirectional_skip", False),
            stated=is_waiting() or getattr(arguments.get("config"), STATED, False),
        )


def key_range_mask(**arguments: Any) -> Tensor | None:
    """The mask function for AttentionMaskInterface, with the arguments of transformers' `sdpa_mask`.

    Returns None if causal=True, or no mask, describes the visible keys; int32 [B, 1, Q, 2] if every row attends to a
    range of keys; and transformers' dense bool [B, 1, Q, K] otherwise. While compiling, padding with holes fails an
    assertion.
    """
    request = MaskRequest.of(arguments)
    bounds = None if arguments.get("use_vmap") else _bounds(request.mask_function, request.position[None])
    if bounds is None:
        return _dense(arguments)
    padded, padding = _padding_state(request)
    if padding is not None and padded == "holes":
        return _dense(arguments)
    if padded == "none" and _is_implied(request):
        return None
    return _stacked(bounds if padding is None else bounds.within(padding), request)


def _is_implied(request: MaskRequest) -> bool:
    """True where the module's is_causal flag alone describes the visible keys, bottom-right aligned."""
    if request.stated or (request.local_size is not None and request.kv_length > request.local_size):
        return False
    kinds = _kinds(request.mask_function)
    if kinds <= {"bidirectional", "bidirectional window"}:
        return request.may_skip_bidirectional
    return request.may_skip_causal and request.aligned and kinds <= {"causal", "window"}


def _padding_state(request: MaskRequest) -> tuple[str, Bounds | None]:
    """Classify padding: ("none" | "range" | "holes", the range of unmasked keys [B, 1]).

    Reads the mask on the host, once, except while compiling.
    """
    if request.padding is None:
        return "none", None
    key = torch.arange(request.kv_length, device=request.padding.device) + request.key_offset
    length = request.padding.shape[-1]
    seen = request.padding.bool()[:, key.clamp(max=length - 1)] & (key < length)  # [B, K]
    count = seen.sum(-1)
    first = seen.int().argmax(-1)
    end = torch.where(count > 0, request.kv_length - seen.flip(-1).int().argmax(-1), first)
    bounds = Bounds(*((side + request.key_offset)[:, None] for side in (first, end)))
    whole, ranges = (count == request.kv_length).all(), (count == end - first).all()
    if torch.compiler.is_compiling():
        torch._assert_async(ranges, _COMPILED_HOLES)  # pyright: ignore[reportPrivateImportUsage]
        return "range", bounds
    whole, ranges = torch.stack([whole, ranges]).tolist()
    return ("none" if whole else "range" if ranges else "holes"), bounds


def _stacked(bounds: Bounds, request: MaskRequest) -> Tensor:
    """Bounds as int32 [B, 1, Q, 2], counted from the first key."""
    shape = (request.batch_size, request.q_length)
    sides = [(side - request.key_offset).clamp(0, request.kv_length).expand(shape) for side in bounds]
    return torch.stack(sides, dim=-1)[:, None].to(torch.int32)


def _dense(arguments: dict[str, Any]) -> Tensor:
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = masking_utils.sdpa_mask(**{**arguments, **skips})
    assert mask is not None  # it is None only by a skip
    return mask


def _kind(function: Callable) -> str:
    """The kind of a mask function of transformers, by identity or qualified name; "unknown" for others."""
    if function is masking_utils.causal_mask_function:
        return "causal"
    if function is getattr(masking_utils, "bidirectional_mask_function", None):
        return "bidirectional"
    # torch.compile cannot read the variables of a closure that it traces.
    if torch.compiler.is_compiling() or getattr(function, "__module__", None) != masking_utils.__name__:
        return "unknown"
    return _CLOSURES.get(function.__qualname__.split(".")[0], "unknown")


_CLOSURES = {
    "and_masks": "and",
    "sliding_window_overlay": "window",
    "sliding_window_bidirectional_overlay": "bidirectional window",
    "chunked_overlay": "chunk",
    "packed_sequence_mask_function": "packed",
    "remap_positions_for_packed_sequence": "remapped",
}
_CAPTURING = frozenset(_CLOSURES.values())


def _captured(function: Callable) -> tuple[Any, ...]:
    """The variables of a closure of transformers, in alphabetical order of their names."""
    return tuple(cell.cell_contents for cell in function.__closure__ or ())


def _kinds(function: Callable) -> set[str]:
    kind = _kind(function)
    return set().union(*map(_kinds, _captured(function)[0])) if kind == "and" else {kind}


def _bounds(function: Callable, position: Tensor) -> Bounds | None:
    """The keys that a mask function shows to rows at position [B or 1, Q]; None if they may be no range."""
    kind = _kind(function)
    if kind == "and":
        kinds = _kinds(function)
        # Positions restart in every packed document, so remapped bounds hold only inside the row's own document.
        if "remapped" in kinds and "packed" not in kinds:
            return None
        total = Bounds.open(position)
        for part in _captured(function)[0]:
            bounds = _remapped(part, position) if _kind(part) == "remapped" else _bounds(part, position)
            if bounds is None:
                return None
            total = total.within(bounds)
        return total
    rule = _RULES.get(kind)
    return None if rule is None else rule(position, *(_captured(function) if kind in _CAPTURING else ()))


def _remapped(function: Callable, position: Tensor) -> Bounds | None:
    inner, position_ids = _captured(function)
    own = position_ids.gather(1, position.expand(position_ids.shape[0], -1))  # [B, Q], steps of 1 in a document
    bounds = _bounds(inner, own)
    return None if bounds is None else Bounds(*(side + position - own for side in bounds))


def _chunk(position: Tensor, chunk_size: int, left_padding: Tensor | None = None) -> Bounds:
    start = 0 if left_padding is None else left_padding.to(position.device)[:, None]
    lo = (position - start).div(chunk_size, rounding_mode="floor") * chunk_size + start
    return Bounds(lo, lo + chunk_size)


def _packed(position: Tensor, documents: Tensor) -> Bounds:
    documents = documents.contiguous()  # [B, K], never falling along the keys
    own = documents.gather(1, position.expand(documents.shape[0], -1))
    return Bounds(torch.searchsorted(documents, own), torch.searchsorted(documents, own, right=True))


_RULES: dict[str, Callable[..., Bounds]] = {
    "causal": lambda position: Bounds(Bounds.open(position).lo, position + 1),  # torch 2.8 traces no `_replace`
    "bidirectional": Bounds.open,
    "window": lambda position, size: Bounds(position - size + 1, Bounds.open(position).hi),
    "bidirectional window": lambda position, size: Bounds(position - size, position + size + 1),
    "chunk": _chunk,
    "packed": _packed,
}
