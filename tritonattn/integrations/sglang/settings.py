"""Settings and weights of a patched model in SGLang, and the settings of a server that it cannot have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ...calls.layouts import SMALLEST_PAGE
from ...huggingface.settings import ATTRIBUTE, Settings, saved_layers
from ..serving.settings import LayerFactor, saved_settings, without_learned
from . import OWNER

_LEARNED = "learned_by_tritonattn"
# Settings of SGLang, and the values with which the backend serves.
_SERVED: dict[str, tuple[Any, ...]] = {
    "attn_cp_size": (1, None),
    "attn_dp_size": (1, None),
    "dcp_size": (1, None),
    "dllm_algorithm": (None,),
    "enable_hisparse": (False,),
    "enable_kv_cache_sharding": (False,),
    "enable_page_major_kv_layout": (False,),
    "enable_pdmux": (False,),
    "enable_two_batch_overlap": (False,),
    "enable_unified_memory": (False,),
    "pp_size": (1,),
    "prefill_only_disable_kv_cache": (False,),
    "speculative_algorithm": (None,),
}
# Those that move keys and values out of the cache, without the record beside them.
_SERVED_WITH_NORMS: dict[str, tuple[Any, ...]] = {
    "disaggregation_mode": ("null",),
    "enable_flexkv": (False,),
    "enable_hierarchical_cache": (False,),
    "enable_lmcache": (False,),
}
NORMS = 24  # bytes of a record of key norms, for each key and key head


def are_asked_for(server_args: Any) -> bool:
    """True where the command gives the settings, which replace those of the checkpoint."""
    return ATTRIBUTE in json.loads(server_args.json_model_override_args or "{}")


def check_server(settings: Any, model_config: Any) -> None:
    """Raise NotImplementedError for settings of SGLang with which the backend does not serve; `settings` resolved."""
    dtype = str(model_config.dtype).removeprefix("torch.")
    served = {**_SERVED, "kv_cache_dtype": ("auto", dtype)}
    if reads_norms(model_config):
        served |= _SERVED_WITH_NORMS
    for name, wanted in served.items():
        if (value := getattr(settings, name, wanted[0])) not in wanted:
            refuse(name, " or ".join(str(x) for x in wanted if x is not None or len(wanted) == 1), value)
    if settings.page_size % SMALLEST_PAGE:
        refuse("page_size", f"a multiple of {SMALLEST_PAGE}", settings.page_size)
    if model_config.attention_arch.name != "MHA":
        refuse("a model with attention", "MHA", model_config.attention_arch.name)
    if model_config.is_encoder_decoder:
        refuse("a model", "a decoder", "an encoder and a decoder")


def refuse(name: str, expected: Any, got: Any) -> None:
    raise NotImplementedError(f"{OWNER}: expected {name} {expected}, got {got}")


def reads_norms(model_config: Any) -> bool:
    """True where a layer's scaling reads the norms of keys."""
    saved, heads = saved_settings(model_config) or {}, model_config.num_attention_heads
    layers = {ATTRIBUTE: saved} if (found := saved_layers(saved)) is None else found
    every = [Settings.from_config(one, heads, entry) for entry, one in layers.items()]
    return any(LayerFactor.of(one, 1.0, (heads, heads), model_config.head_dim).reads_norms for one in every)


def take_learned(iterate: Any) -> Any:
    """The extended iterator of SGLang's loader, which keeps a patch's learned values with the model's config."""

    def weights(loader: Any, source: Any, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        config, read = source.model_config, iterate(loader, source, *args, **kwargs)
        if config is None or saved_settings(config) is None:
            return read
        return without_learned(read, vars(config).setdefault(_LEARNED, {}), is_patched=True)

    return weights


def learned_values(model_config: Any) -> dict[str, dict[str, Tensor]]:
    """The values that `take_learned` kept, by the saved module's name."""
    return vars(model_config).get(_LEARNED, {})
