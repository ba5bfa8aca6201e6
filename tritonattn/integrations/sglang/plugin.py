"""The plugin that SGLang loads in each of its processes: registration of the backend, and when it is chosen."""

# pyright: reportMissingImports=false
from __future__ import annotations

import logging
from typing import Any

from ...calls.layouts import SMALLEST_PAGE
from ...core.extension import extend
from ...core.private_names import private
from ...huggingface.settings import forget_mark
from ..serving.settings import saved_settings
from ..serving.versions import Versions
from . import NAME
from .settings import NORMS, check_server, reads_norms, take_learned

VERSIONS = Versions("sglang", "0.5.23", "0.6")  # those that the tests ran
_BACKENDS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")


def register() -> None:
    """Register the backend with SGLang, and let it be chosen for patched models; repeatable.

    Entry point of the group sglang.srt.plugins.
    """
    try:
        from sglang.srt.arg_groups import choices
        from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend

        private("sglang.srt.configs.model_config.ModelConfig._parse_quant_hf_config")
    except ImportError as error:
        message = "tritonattn: cannot register its attention backend, and serves no patched model: %s; %s"
        logging.getLogger("sglang.tritonattn").warning(message, VERSIONS.expected(), error)
        return
    if NAME in ATTENTION_BACKENDS:
        return
    register_attention_backend(NAME)(_backend)
    for known in (
        choices.ATTENTION_BACKEND_CHOICES,
        choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES,
        choices.RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND,
    ):
        known.append(NAME)
    extend(ModelConfig, "_parse_quant_hf_config", _without_mark)
    # After models and platforms have chosen for themselves, and after all is resolved.
    register_resolution_hook("handle_deterministic_inference")(_choose)
    register_resolution_hook("validate_deepep_v2_dispatch_token_budget")(_check)


def _backend(runner: Any) -> Any:
    from .backend import TritonattnAttnBackend

    return TritonattnAttnBackend(runner)


def _choose(server_args: Any, previous: Any) -> None:
    """Choose the backend for a patched model, with pages as its kernels have them, before `previous` goes on."""
    from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of

    asked = {name: getattr(server_args, name) for name in _BACKENDS}
    is_patched = saved_settings(model_config_of(server_args)) is not None
    if is_patched or NAME in asked.values():
        for name, backend in asked.items():
            if backend not in (None, NAME):
                raise ValueError(
                    f"{name}: expected {NAME} or none for a model with scalings of tritonattn, got {backend}, which"
                    " does not compute them"
                )
        VERSIONS.check()
        page = SMALLEST_PAGE if server_args.page_size is None else server_args.page_size
        chosen = dict.fromkeys(_BACKENDS) | {"attention_backend": NAME, "page_size": page}
        declare_resolution(server_args, "tritonattn", **chosen)
    _check(server_args, previous=lambda _: None)  # before SGLang checks the settings for other backends
    previous(server_args)


def _check(server_args: Any, previous: Any) -> None:
    """Refuse what the backend does not serve, once `previous` has resolved its part."""
    from sglang.srt.arg_groups.overrides import model_config_of, resolved_view

    previous(server_args)
    settings = resolved_view(server_args)
    if settings.attention_backend == NAME:
        check_server(settings, model_config_of(server_args))


def _without_mark(parse: Any) -> Any:
    """The extended reader of a model's quantization, which takes no mark of a patch for one."""

    def parsed(model_config: Any) -> Any:
        forget_mark(model_config.hf_config)
        if saved_settings(model_config) is not None:
            _prepare_loading()
        return parse(model_config)

    return parsed


def _prepare_loading() -> None:
    """Let SGLang's loader keep a patch's learned values, and its cache leave room for records of key norms."""
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
    from sglang.srt.model_loader.loader import DefaultModelLoader

    extend(DefaultModelLoader, "_get_weights_iterator", take_learned)
    extend(KVCacheConfigurator, "_profile_available_bytes", _beside_norms)


def _beside_norms(profile: Any) -> Any:
    def available(configurator: Any, *args: Any, **kwargs: Any) -> int:
        found, config = profile(configurator, *args, **kwargs), configurator.model_config
        if not reads_norms(config):
            return found
        cell = (config.head_dim + config.v_head_dim) * configurator.kv_cache_dtype.itemsize
        return found * cell // (cell + NORMS)

    return available
