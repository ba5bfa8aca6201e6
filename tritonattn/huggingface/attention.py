"""transformers' attention interface on top of `tritonattn.attention`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..api import attention
from .masks import key_range_mask
from .settings import Settings

NAME = "tritonattn"

# Keyword arguments that change the result and that nothing here can honour.
_REFUSED = {
    "position_bias": "a bias on the logits",
    "indices": "sparse key indices",
    "block_indices": "sparse block indices",
    "sinks": "sink keys",
    "head_mask": "a mask of whole heads",
}

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function for AttentionInterface: [B, Hq, Q, D], [B, Hkv, K, D], [B, Hkv, K, Dv] to [B, Q, Hq, Dv].

    The scaling is the one of `Settings.of(module)`. Raises NotImplementedError naming any argument that
    changes the result and that is not supported (a bias on the logits, sparse indices, attention weights as
    an output).
    """
    arguments = call_arguments(module, query, key, attention_mask, scaling, dropout, **kwargs)
    out = cast(Tensor, attention(query, key, value, **arguments))
    return out.transpose(1, 2).contiguous(), None


def call_arguments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """The keyword arguments of `tritonattn.attention` that say what transformers asks for."""
    _refuse_unsupported(kwargs)
    settings = Settings.of(module)
    return {
        **_scaling_arguments(module, settings, scaling),
        **_mask_arguments(module, query, key, attention_mask, kwargs),
        "softcap": softcap,
        "sinks": s_aux,
        "dropout_p": dropout,
        "backend": settings.backend,
    }


def register(
    name: str = NAME,
    function: AttentionFunction = attention_forward,
    mask_function: Callable[..., Tensor | None] = key_range_mask,
) -> None:
    """Make function known to transformers: `model.set_attn_implementation(name)`. Repeating it is harmless.

    The mask function is registered with it; without one transformers would pass no mask, padding or not.
    """
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, mask_function)


def unregister(name: str = NAME) -> None:
    """Undo `register`; models that still use the name fail at their next call."""
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(name, None)


def _refuse_unsupported(kwargs: dict[str, Any]) -> None:
    for name, meaning in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{name}: {meaning} is not supported by tritonattn; use attn_implementation='eager'"
            )
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            "output_attentions: tritonattn never forms the attention weights; use attn_implementation='eager'"
        )


def _scaling_arguments(module: nn.Module, settings: Settings, scaling: float | None) -> dict[str, Any]:
    if settings.scaling is None:
        own = "sqrt_dim" if scaling is None else float(scaling)
        return {"scaling": own, "gain": settings.gain}
    gain = settings.gain
    applied = _applied_before(module, scaling)
    if applied != 1.0:
        gain = (1.0 if gain is None else gain) / applied
    return {"scaling": settings.scaling, "gain": gain}


def _applied_before(module: nn.Module, scaling: float | None) -> float:
    """The factor by which the model has multiplied the query: Whisper and its like then pass scaling=1."""
    own = getattr(module, "scaling", None)
    if scaling != 1.0 or own == 1.0:
        return 1.0
    if isinstance(own, float):
        return own
    warnings.warn(
        f"{type(module).__name__} passes scaling=1.0: the scaling chosen for tritonattn multiplies the "
        "logits as this model forms them, which it may have scaled already",
        stacklevel=2,
    )
    return 1.0


def _mask_arguments(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    if mask is None:
        return _implied_mask(module, query, key, kwargs)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        got = f"{mask.dim()}-D" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: wanted a 4-D tensor from tritonattn's mask function, got {got}")
    if mask.dtype == torch.int32:
        if mask.shape[-1] != 2:
            raise ValueError(f"attention_mask: wanted key ranges [B, 1, Q, 2], got int32 {list(mask.shape)}")
        return {"key_ranges": mask}
    mask = mask[..., : key.shape[-2]]
    return {"mask": mask if mask.dtype == torch.bool else _without_bias(mask)}


def _without_bias(mask: Tensor) -> Tensor:
    """The bool mask that an additive mask of 0 and very negative entries means; other biases are refused."""
    visible = mask == 0
    pure = (visible | (mask <= torch.finfo(mask.dtype).min / 2)).all()
    message = (
        "attention_mask: a bias on the logits is not supported by tritonattn; wanted only 0 and -inf "
        "(or the dtype's minimum)"
    )
    if torch.compiler.is_compiling():
        torch._assert_async(pure, message)  # pyright: ignore[reportPrivateImportUsage]
    elif not pure:
        raise NotImplementedError(message)
    return visible


def _implied_mask(module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """No mask: the module's is_causal flag, packed documents and the window say what is visible."""
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    window = _window(causal, query, key, kwargs)
    if kwargs.get("cu_seq_lens_q") is not None:
        ranges = _document_ranges(query.shape[2], kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"], causal)
        return {"key_ranges": ranges.expand(query.shape[0], -1, -1), **window}
    return {"causal": causal and query.shape[2] > 1, **window}


def _window(causal: bool, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    size = kwargs.get("sliding_window")
    if size is None or size >= key.shape[2]:
        return {}
    packed = kwargs.get("cu_seq_lens_q") is not None
    if not causal or (packed and query.shape[2] != key.shape[2]):
        raise NotImplementedError(
            "sliding_window: without a mask, tritonattn knows a window only for causal attention, in "
            "packed documents only where queries and keys are as many"
        )
    return {"window": (size - 1, None)}


def _document_ranges(q_length: int, q_ends: Tensor, k_ends: Tensor, causal: bool) -> Tensor:
    """Packed documents as ranges, int32 [1, Q, 2]: document d sees the keys [k_ends[d], k_ends[d + 1]).

    q_ends and k_ends int [documents + 1] start at 0 (`cu_seq_lens_q`, `cu_seq_lens_k`); causal is
    bottom-right in every document; rows past the last document see nothing.
    """
    row = torch.arange(q_length, device=q_ends.device)
    document = torch.searchsorted(q_ends.contiguous(), row, right=True) - 1
    inside = document < q_ends.shape[0] - 1
    document = document.clamp(max=max(q_ends.shape[0] - 2, 0))
    lo, hi = k_ends[document].long(), k_ends[document + 1].long()
    if causal:
        hi = torch.minimum(hi, hi - q_ends[document + 1] + row + 1)
    return torch.stack([lo, torch.where(inside, hi, lo)], dim=-1)[None].to(torch.int32)
