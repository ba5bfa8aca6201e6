"""The plugin that vLLM loads in each of its processes: registration of the backend, and when it is chosen."""

# pyright: reportMissingImports=false
from __future__ import annotations

import logging
from typing import Any

from ...core.extension import extend
from ...core.private_names import private
from ..serving.versions import Versions
from . import NAME

VERSIONS = Versions("vllm", "0.33.0", "0.34")  # those that the tests ran
_EXTENDED = (
    "vllm.v1.attention.selector._cached_get_attn_backend",
    "vllm.transformers_utils.model_arch_config_convertor.ModelArchConfigConvertorBase._normalize_quantization_config",
)
_BACKEND = f"{__package__}.backend.TritonattnBackend"


def register() -> None:
    """Register the backend with vLLM, and let it be chosen for patched models; repeatable.

    Entry point of the group vllm.general_plugins.
    """
    try:
        from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase
        from vllm.v1.attention import selector
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        for path in _EXTENDED:
            private(path)
    except ImportError as error:
        message = "tritonattn: cannot tell which models are patched, and serves none of them: %s; %s"
        logging.getLogger("vllm.tritonattn").warning(message, VERSIONS.expected(), error)
        return
    if NAME not in AttentionBackendEnum.__members__:
        register_backend(NAME, _BACKEND)
    # vLLM keeps its choice by arguments that do not tell a patched model from another.
    extend(selector, "_cached_get_attn_backend", _extended)
    extend(ModelArchConfigConvertorBase, "_normalize_quantization_config", _without_mark)


def _extended(choose: Any) -> Any:
    def chosen(backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.config import get_current_vllm_config

        from .settings import saved_settings

        asked = getattr(backend, "name", None)
        is_patched = saved_settings(get_current_vllm_config()) is not None
        if not is_patched and asked != NAME:
            return choose(backend, attn_selector_config, *args, **kwargs)
        if asked not in (None, NAME):
            raise ValueError(
                f"attention_backend: expected {NAME} or none for a model with scalings of tritonattn, got {asked},"
                " which does not compute them"
            )
        VERSIONS.check()
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        from .backend import TritonattnBackend
        from .settings import take_learned

        take_learned(DefaultModelLoader)
        reasons = TritonattnBackend.validate_configuration(**attn_selector_config._asdict(), device_capability=None)
        if reasons:
            raise NotImplementedError(f"attention_backend {NAME}: {'; '.join(reasons)}: {attn_selector_config}")
        return TritonattnBackend

    return chosen


def _without_mark(normalize: Any) -> Any:
    def normalized(convertor: Any, config: Any) -> Any:
        from ...huggingface.settings import forget_mark

        forget_mark(config)
        return normalize(convertor, config)

    return normalized
