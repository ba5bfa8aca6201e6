"""Translate transformers' mask, or its absence, into the visibility arguments of `tritonattn.attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.masks import visible_keys
from .settings import layer_scaling


def visible_arguments(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments causal, window, key_ranges and mask of `tritonattn.attention`.

    mask is int32 [B, 1, Q, 2] from tritonattn's mask function. If only some layers of a model are patched, it is the
    4-D mask of "sdpa" (bool) or "eager" (0 and very negative).

    Raises ValueError or TypeError for any other mask, NotImplementedError for one that holds a bias.
    """
    if mask is None:
        return _implied(module, query, key, kwargs)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        got = f"{mask.dim()}-D" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask: expected a 4-D tensor from the mask function of tritonattn, sdpa or eager, got {got};"
            " if only some layers are patched, the model's own implementation has to be one of these"
        )
    if mask.dtype == torch.int32:
        if mask.shape[-1] != 2:
            raise ValueError(f"attention_mask: expected key ranges [B, 1, Q, 2], got int32 {list(mask.shape)}")
        return {"key_ranges": mask.expand(query.shape[0], -1, -1, -1)}
    return {"mask": visible_keys("attention_mask", mask[..., : key.shape[-2]])}


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
    source = getattr(getattr(layer_scaling(module), "shared", None), "_attn_implementation", None)  # None: tritonattn
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
