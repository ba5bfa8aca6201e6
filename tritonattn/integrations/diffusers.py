"""Attention backends for diffusers, one a scaling: `model.set_attention_backend("tritonattn")`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..calls.checks import Backend
from ..core.errors import install
from ..core.private_names import attribute, private
from ..nn.learned import as_mode
from ..scaling import Scaling
from ..scaling.names import ModeName
from .arguments import attend
from .replacement import Replacement

try:
    from diffusers.models.attention_dispatch import AttentionBackendName
except ImportError as error:
    raise ImportError(f"tritonattn.integrations.diffusers needs diffusers: {install('integrations')}") from error

NAME = "tritonattn"
_REGISTRY = "diffusers.models.attention_dispatch._AttentionBackendRegistry"
_registry = private(_REGISTRY)


def register(name: str = NAME, scaling: ModeName | str | Scaling = "sqrt_dim", backend: Backend = "auto") -> None:
    """Register a scaling with diffusers as an attention backend, or register a name of ours again.

    Args:
        name: For `model.set_attention_backend(name)` and `with attention_backend(name)`, in lower case.
        scaling, backend: As in `scaled_sdpa`; the parameters of a learned one are yours to train and keep.

    Masks are bool, True for visible, or additive: entries of at most -1e4 hide, and others are a bias. Context
    parallelism raises NotImplementedError. diffusers has no public registry: this adds an entry to its enumeration of
    backends.

    Raises:
        TypeError, ValueError: An invalid scaling; a name that is not lower case, or one of diffusers'.
    """
    mode = as_mode(scaling)
    if name != name.lower():
        raise ValueError(f"name: expected lower case, the only case that diffusers looks for, got {name!r}")
    entry: Any = AttentionBackendName._value2member_map_.get(name)
    if entry is not None and entry not in _OURS:
        raise ValueError(f"name: expected one that diffusers does not have, got {name!r}")
    entry = _new_entry(name) if entry is None else entry
    _OURS.add(entry)
    _registry.register(entry)(_function(mode, backend))


def unregister(name: str = NAME) -> None:
    """Undo `register`. Models that still use the name fail at their next call. Raises ValueError for other names."""
    entry = _registered(name)
    _OURS.discard(entry)
    for table in ("_backends", "_constraints", "_supported_arg_names"):
        attribute(_registry, f"{_REGISTRY}.{table}").pop(entry)
    AttentionBackendName._value2member_map_.pop(name)
    AttentionBackendName._member_map_.pop(name.upper())
    AttentionBackendName._member_names_.remove(name.upper())


def use(model: nn.Module, name: str = NAME) -> Replacement:
    """Let the layers of one model use a registered backend until `.undo()`.

    `model.set_attention_backend` also changes every model of the process that has chosen none, and is silent if a
    model's processors take no backend.

    Raises:
        ValueError: A name that `register` did not make, or a model none of whose attention processors takes a backend.
    """
    entry, backend = _registered(name), "_attention_backend"
    processors = ((layer, getattr(module, "processor", None)) for layer, module in model.named_modules())
    changes = [(layer, processor, backend, entry) for layer, processor in processors if hasattr(processor, backend)]
    return Replacement(model, "attention processors that take a backend", changes)


_OURS: set[Any] = set()


def _registered(name: str) -> Any:
    entry = AttentionBackendName._value2member_map_.get(name)
    if entry not in _OURS:
        raise ValueError(f"name: expected one that `register` made, got {name!r}")
    return entry


def _new_entry(name: str) -> Any:
    """Add a name to diffusers' enumeration of backends."""
    entry: Any = str.__new__(AttentionBackendName, name)
    entry._name_, entry._value_ = name.upper(), name
    AttentionBackendName._member_map_[name.upper()] = entry
    AttentionBackendName._value2member_map_[name] = entry
    AttentionBackendName._member_names_.append(name.upper())
    return entry


def _function(scaling: Scaling, backend: Backend) -> Any:
    # diffusers passes the arguments that this signature names, and drops others with a warning.
    def scaled(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend: [B, S, H, D] each, as diffusers lays them out; lse [B, S, H]."""
        if _parallel_config is not None:
            raise NotImplementedError("_parallel_config: context parallelism is not supported by tritonattn")
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
            attn_mask = attn_mask[:, None, None]
        options = {"scale": scale, "enable_gqa": enable_gqa, "options": {"return_aux": return_lse}}
        result = attend(scaling, backend, q, k, v, attn_mask, dropout_p, is_causal, **options)
        if not return_lse:
            return result.transpose(1, 2)
        out, aux = result
        return out.transpose(1, 2), aux.lse.transpose(1, 2)

    return scaled
