"""Saving the scalings of a model, and applying them when it is loaded.

`patch` writes them into the config, together with attn_implementation = "tritonattn". So a process without
`tritonattn.huggingface` refuses the checkpoint instead of computing something else, if its version of transformers
reads that entry (5.8 does, 5.0 does not). For older versions and other programs `save_pretrained` adds a tensor, MARK,
to the weights. Its name is unknown to them: they stop or warn. With tritonattn, every model applies the settings at the
end of its construction, before its weights are read. Learned values that are missing among the weights start again.

A model that cannot use "tritonattn" raises: at set_attn_implementation, or at its first call if it was constructed so,
since an outer model may still choose another implementation for it.
"""

from __future__ import annotations

import contextvars
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..core.extension import extend
from .architecture import AttentionModule, attention_modules, query_heads, refuse_unsupported
from .attention import NAME
from .first_use import living_models
from .masks import STATED
from .own_configs import IMPLEMENTATION, SAVED_IMPLEMENTATION, state_masks
from .patching import Patched, apply, patched
from .settings import ATTRIBUTE, LAYERS, MARK, LayerScaling, Settings, layer_scaling, saved_layers

_ASKED = "_tritonattn_implementation_asked_for"
_OF_VLLM = "vllm"  # in models that vLLM builds, whose attention is its own: its plugin reads the settings


def restore(model: PreTrainedModel) -> Patched:
    """Apply the settings that a `patch` left in model.config to a model that was built without them.

    from_pretrained does so by itself, and loads learned values; here they start again. Raises ValueError if the config
    has no settings, or names a module that the model lacks.
    """
    saved = _saved(model)
    if saved is None:
        raise ValueError(f"model: expected scalings of layers in config.{ATTRIBUTE}, got none")
    found = attention_modules(model)
    chosen = _of_saved_names(model, found, saved)
    missing = [name for name in saved if name not in chosen]
    if missing:
        raise ValueError(f"model: {type(model).__name__} has no {', '.join(missing)}, which config.{ATTRIBUTE} names")
    return _apply(model, found, chosen, saved)


def follow_saved_settings() -> None:
    """Let every model save its settings, and apply those in its config when it is made. Repeating it is harmless."""
    _extend("post_init", then=_follow)
    _extend("_initialize_missing_keys", then=_start_again)
    _extend("set_attn_implementation", then=_refuse)
    _extend("save_pretrained", within=_saved_as_patched)
    for one in living_models():  # which may have chosen "tritonattn" unnoticed
        state_masks(one)


def _extend(
    name: str,
    then: Callable[..., None] = lambda model, arguments: None,
    within: Callable[..., AbstractContextManager[None]] = lambda model, arguments: nullcontext(),
) -> None:
    """Run a method of all models in the context within(model, arguments), then call then(model, arguments).

    arguments   the method's, by name, which the context may change
    """
    running = contextvars.ContextVar(name, default=False)

    def extended(original: Any) -> Any:
        signature = inspect.signature(original)

        def method(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            if running.get():  # called by an outer model
                return original(self, *args, **kwargs)
            token, bound = running.set(True), signature.bind(self, *args, **kwargs)
            try:
                with within(self, bound.arguments):
                    result = original(*bound.args, **bound.kwargs)
            finally:
                running.reset(token)
            then(self, bound.arguments)
            return result

        return method

    extend(PreTrainedModel, name, extended)


def _saved(model: PreTrainedModel) -> dict[str, Any] | None:
    return saved_layers(getattr(model.config, ATTRIBUTE, None))


@contextmanager
def _saved_as_patched(model: PreTrainedModel, arguments: dict[str, Any]) -> Iterator[None]:
    own = {one.name: layer_scaling(one.module) for one in attention_modules(model)}
    layers = {name: one.to_config() for name, one in own.items() if one is not None and not one.temporary}
    with _marked(model, arguments) if layers else nullcontext(), _settings_in_config(model, layers):
        yield


@contextmanager
def _marked(model: PreTrainedModel, arguments: dict[str, Any]) -> Iterator[None]:
    """Add MARK to the weights that are saved; not to those of adapters alone, nor where `Patched.mark` is False."""
    unwanted = any(not one.mark for module in model.modules() if (one := patched(module)) is not None)
    if unwanted or getattr(model, "_hf_peft_config_loaded", False):
        yield
        return
    mark = torch.ones(1, dtype=torch.uint8)
    if arguments.get("state_dict") is not None:
        arguments["state_dict"] = {**arguments["state_dict"], MARK: mark}
    model.register_buffer(MARK, mark)
    try:
        yield
    finally:
        delattr(model, MARK)


@contextmanager
def _settings_in_config(model: PreTrainedModel, layers: dict[str, Any]) -> Iterator[None]:
    """State the settings of patched layers in a config that does not: that of a model of which a part was patched."""
    if not layers or hasattr(model.config, ATTRIBUTE):
        yield
        return
    entries = vars(model.config)
    before = {name: entries[name] for name in (SAVED_IMPLEMENTATION,) if name in entries}
    entries.update({ATTRIBUTE: {LAYERS: layers}, SAVED_IMPLEMENTATION: NAME})
    try:
        yield
    finally:
        for name in (ATTRIBUTE, SAVED_IMPLEMENTATION):
            entries.pop(name)
        entries.update(before)


def _follow(model: PreTrainedModel, _: dict[str, Any]) -> None:
    if model.config._attn_implementation == _OF_VLLM:
        return
    saved = _saved(model)
    if saved is None:
        if (for_all := getattr(model.config, ATTRIBUTE, None)) is not None:
            Settings.from_config(for_all)  # refuse a damaged one now
        if model.config._attn_implementation == NAME:
            _refuse_when_called(model)
        state_masks(model)
        return
    found = attention_modules(model)
    chosen = _of_saved_names(model, found, saved)
    if len(chosen) < len(saved):  # the outer model will apply them; without one the first call raises
        vars(model.config).setdefault(_ASKED, model.config._attn_implementation)
        setattr(model.config, IMPLEMENTATION, NAME)
        setattr(model.config, ATTRIBUTE, {LAYERS: dict(saved)})  # of a copied config they were applied elsewhere
        return
    # Inner models share the config and have applied it first: the outer model does it again for all.
    for module in model.modules():
        if (inner := patched(module)) is not None:
            inner.undo()
    _apply(model, found, chosen, saved)


def _refuse(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Raise, where transformers would warn and keep the former implementation."""
    if arguments.get("attn_implementation") == NAME:
        refuse_unsupported(model, attention_modules(model))
    state_masks(model)


def _refuse_when_called(model: PreTrainedModel) -> None:
    def check(model: PreTrainedModel, _: Any) -> None:
        if model.config._attn_implementation == NAME:
            refuse_unsupported(model, attention_modules(model))

    found = attention_modules(model)
    if found and all(one.obstacle is not None for one in found):
        model.register_forward_pre_hook(check)


def _of_saved_names(
    model: PreTrainedModel, found: list[AttentionModule], saved: dict[str, Any]
) -> dict[str, AttentionModule]:
    """The modules of saved names, which come from the model with or without its head.

    base_model_prefix need not be the name of the attribute that holds the model without its head (Llama 4).
    """
    prefix = f"{model.base_model_prefix}."
    by_name = {one.name: one for one in found if one.obstacle is None}
    chosen = {}
    for name in saved:
        inside = [one for one in by_name if one.endswith(f".{name}")]
        candidates = [name, name.removeprefix(prefix), prefix + name, *(inside if len(inside) == 1 else ())]
        if (match := next((one for one in candidates if one in by_name), None)) is not None:
            chosen[name] = by_name[match]
    return chosen


def _apply(
    model: PreTrainedModel, found: list[AttentionModule], chosen: dict[str, AttentionModule], saved: dict[str, Any]
) -> Patched:
    """Patch a model as if its config had no settings, so that `undo` leaves none."""
    for one in model.modules():
        # T5's encoder and decoder have copies of the config.
        if one is model or (isinstance(one, PreTrainedModel) and ATTRIBUTE in vars(one.config)):
            _forget_settings(one)
    # Learned values stay in float32, whatever the dtype of the weights.
    model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), ATTRIBUTE}
    if isinstance(dtypes := getattr(model, "dtype_plan", None), dict):  # the first versions 5
        dtypes[ATTRIBUTE] = torch.float32
    known: Any = model._keys_to_ignore_on_load_unexpected
    model._keys_to_ignore_on_load_unexpected = {*known, MARK} if isinstance(known, set) else [*(known or ()), MARK]
    plans = {one.name: _layer_scaling(saved, name, one.module) for name, one in chosen.items()}
    result = apply(model, found, plans, copied=False)
    _shard_by_head(model, result)
    return result


def _forget_settings(model: Any) -> None:
    config = model.config
    asked = vars(config).pop(_ASKED, config._attn_implementation)
    for name in (ATTRIBUTE, SAVED_IMPLEMENTATION, STATED):
        vars(config).pop(name, None)
    if config._attn_implementation == NAME:
        default = model._check_and_adjust_attn_implementation(None if asked == NAME else asked)
        config._attn_implementation = default  # also of sub-configs


def _shard_by_head(model: PreTrainedModel, patch: Patched) -> None:
    """Let a tensor parallel plan that shards q by head do the same with what layers have learned by head."""
    plan: Any = getattr(model, "_tp_plan", None)
    if not plan or importlib.util.find_spec("transformers.distributed.tensor_parallel") is None:
        return
    for layer, own in patch.layers.items():
        if plan.get(_generic(f"{layer}.q_proj")) == "colwise":
            by_head = [name for name, x in own.named_parameters() if x.dim() and x.shape[0] > 1]
            plan.update({_generic(f"{layer}.{ATTRIBUTE}.{name}"): "colwise" for name in by_head})


def _generic(name: str) -> str:
    """A name as plans have it, with * for numbers of layers."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _layer_scaling(saved: dict[str, Any], name: str, module: nn.Module) -> LayerScaling:
    entry = f"config.{ATTRIBUTE}.{LAYERS}[{name!r}]"
    return LayerScaling(Settings.from_config(saved[name], query_heads(module), entry))


@torch.no_grad()
def _start_again(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Initialise learned values that have no weights, which transformers leaves undefined."""
    one = patched(model)
    # transformers marks the tensors that it has read; 4.54 passes their names instead.
    read = arguments.get("loaded_keys", ())
    for layer, own in one.layers.items() if one is not None else ():
        missing = {
            key: x
            for key, x in own.state_dict(keep_vars=True).items()
            if f"{layer}.{ATTRIBUTE}.{key}" not in read and not getattr(x, "_is_hf_initialized", False)
        }
        if missing:
            with torch.device("cpu"):
                fresh = _layer_scaling({layer: own.to_config()}, layer, model.get_submodule(layer)).state_dict()
            for key, x in missing.items():
                x.copy_(fresh[key])
