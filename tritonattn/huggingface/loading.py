"""Saving the scalings of a model, applying them when it is loaded, and checking those of PEFT's adapters.

`patch` writes them into the config, together with attn_implementation = "tritonattn". So a process without
`tritonattn.huggingface` refuses the checkpoint instead of computing something else, if its version of transformers
reads that entry (5.8 does, 5.0 does not). For older versions and other programs `save_pretrained` adds a tensor, MARK,
to the weights. Its name is unknown to them: they stop or warn. CONFIG_MARK names a compression that no server knows:
it stops SGLang, which only warns. With tritonattn, every model applies the settings at the end of its construction,
before its weights are read. Learned values that are missing among the weights start again.

A model that cannot use "tritonattn" raises: at set_attn_implementation, or at its first call if it was constructed so,
since an outer model may still choose another implementation for it.
"""

from __future__ import annotations

import contextvars
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..core.extension import extend
from ..core.private_names import attribute
from ..nn.tied import tie_parameters
from .architecture import AttentionModule, attention_modules, query_heads, refuse_unsupported
from .attention import NAME
from .configs import IMPLEMENTATION, SAVED_IMPLEMENTATION, state_masks
from .first_use import living_models
from .masks import STATED
from .patching import Patched, apply, patched
from .settings import (
    ATTRIBUTE,
    CONFIG_MARK,
    LAYERS,
    MARK,
    LayerScaling,
    Settings,
    forget_mark,
    layer_scaling,
    saved_layers,
)

_ASKED = "_tritonattn_implementation_asked_for"
_OF_VLLM = "vllm"  # in models that vLLM builds, whose attention it brings: its plugin reads the settings


def restore(model: PreTrainedModel) -> Patched:
    """Apply the settings that a `patch` left in model.config to a model that was built without them.

    from_pretrained does so by itself, and loads learned values; here they start again.

    Args:
        model: A transformers model.

    Returns:
        A `Patched`, whose `undo()` leaves no settings in the config.

    Raises:
        ValueError: A config without settings, or one that names a module that the model lacks.

    >>> import transformers, tritonattn.huggingface
    >>> config = transformers.LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    ...     num_attention_heads=2, vocab_size=50)
    >>> model = transformers.LlamaForCausalLM(config)
    >>> model.config.tritonattn = {"layers": {"model.layers.1.self_attn": {"scaling": "key_norm_mean"}}}
    >>> tritonattn.huggingface.restore(model)
    <Patched LlamaForCausalLM: key_norm_mean, backend auto, layers 1>
    """
    saved = _saved(model)
    if saved is None:
        raise ValueError(f"model: expected scalings of layers in config.{ATTRIBUTE}, got none")
    found = attention_modules(model)
    chosen = _of_saved_names(model, found, saved)
    missing = [name for name in saved if name not in chosen]
    if missing:
        got = f"a {type(model).__name__} without {', '.join(missing)}"
        raise ValueError(f"model: expected the modules that config.{ATTRIBUTE} names, got {got}")
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
    """Have, while a patched model is saved, MARK among its weights, and the settings and CONFIG_MARK in its config.

    Weights of adapters alone are not marked, nor those of a `Patched` whose mark is False. The config lacks the
    settings where a part of the model was patched.
    """
    found = {one.name: layer_scaling(one.module) for one in attention_modules(model)}
    layers = {name: layer.to_config() for name, layer in found.items() if layer is not None and not layer.temporary}
    unwanted = any(not one.mark for module in model.modules() if (one := patched(module)) is not None)
    is_marked = bool(layers) and not unwanted and not getattr(model, "_hf_peft_config_loaded", False)
    entries, stated = vars(model.config), {}
    if layers and not hasattr(model.config, ATTRIBUTE):
        stated = {ATTRIBUTE: {LAYERS: layers}, SAVED_IMPLEMENTATION: NAME}
    if is_marked:
        stated |= {name: value for name, value in CONFIG_MARK.items() if not hasattr(model.config, name)}
    before = {name: entries[name] for name in stated.keys() & entries.keys()}
    entries.update(stated)
    if is_marked:
        mark = torch.ones(1, dtype=torch.uint8)
        if arguments.get("state_dict") is not None:
            arguments["state_dict"] = {**arguments["state_dict"], MARK: mark}
        model.register_buffer(MARK, mark)
    try:
        yield
    finally:
        for name in stated:
            entries.pop(name)
        entries.update(before)
        if is_marked:
            delattr(model, MARK)


def _follow(model: PreTrainedModel, _: dict[str, Any]) -> None:
    if model.config._attn_implementation == _OF_VLLM:
        return
    saved = _saved(model)
    if saved is None:
        if (for_all := getattr(model.config, ATTRIBUTE, None)) is not None:
            Settings.from_config(for_all)  # refuse a damaged one now
        if model.config._attn_implementation == NAME:
            if not any(one.obstacle is None for one in attention_modules(model)):
                model.register_forward_pre_hook(_refuse_when_called)
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


def _refuse_when_called(model: PreTrainedModel, _: Any) -> None:
    if model.config._attn_implementation == NAME:
        refuse_unsupported(model, attention_modules(model))


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
    forget_mark(config)
    asked = vars(config).pop(_ASKED, config._attn_implementation)
    for name in (ATTRIBUTE, SAVED_IMPLEMENTATION, STATED):
        vars(config).pop(name, None)
    if config._attn_implementation == NAME:
        choose = attribute(model, "transformers.PreTrainedModel._check_and_adjust_attn_implementation")
        default = choose(None if asked == NAME else asked)
        config._attn_implementation = default  # also of sub-configs


def _shard_by_head(model: PreTrainedModel, patch: Patched) -> None:
    """Let a tensor parallel plan that shards q by head do the same with what layers have learned by head."""
    plan: Any = getattr(model, "_tp_plan", None)
    if not plan or importlib.util.find_spec("transformers.distributed.tensor_parallel") is None:
        return
    for name, layer in patch.layers.items():
        planned = re.sub(r"\.\d+(?=\.|$)", ".*", name)  # as plans have it, with * for numbers of layers
        if plan.get(f"{planned}.q_proj") == "colwise":
            by_head = [parameter for parameter, x in layer.named_parameters() if x.dim() and x.shape[0] > 1]
            plan.update({f"{planned}.{ATTRIBUTE}.{parameter}": "colwise" for parameter in by_head})


def _layer_scaling(saved: dict[str, Any], name: str, module: nn.Module) -> LayerScaling:
    entry = f"config.{ATTRIBUTE}.{LAYERS}[{name!r}]"
    layer = LayerScaling(Settings.from_config(saved[name], query_heads(module), entry))
    tie_parameters(layer.scaling, module, layer.tied, f"{entry}.tied")
    return layer


@torch.no_grad()
def _start_again(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Initialise learned values that have no weights, which transformers leaves undefined."""
    one = patched(model)
    layers = {} if one is None else one.layers
    # transformers marks the tensors that it has read; 4.54 passes their names instead.
    read = arguments.get("loaded_keys", ())
    for name, layer in layers.items():
        missing = {
            key: x
            for key, x in layer.state_dict(keep_vars=True).items()
            if f"{name}.{ATTRIBUTE}.{key}" not in read and not getattr(x, "_is_hf_initialized", False)
        }
        if missing:
            with torch.device("cpu"):
                fresh = _layer_scaling({name: layer.to_config()}, name, model.get_submodule(name)).state_dict()
            for key, x in missing.items():
                x.copy_(fresh[key])


def follow_adapters() -> None:
    """Let PEFT refuse adapters whose scalings are not those of the model's layers. Repeating it is harmless.

    PEFT itself drops weights of modules that the model lacks, and the model goes on with the scaling that it has.
    """
    try:
        from peft import PeftModel
    except Exception:  # none, or one that is broken in any way: it loads no adapters either
        return
    extend(PeftModel, "load_adapter", _refusing)


def _refusing(original: Any) -> Any:
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            result = original(self, *args, **kwargs)
        except KeyError as error:
            if layers := _layers(map(str, error.args)):
                raise _refusal(f"it lacks values of {layers}, which the model has patched") from error
            raise
        if layers := _layers(result.unexpected_keys):
            raise _refusal(f"it has values of {layers} that the model lacks")
        return result

    return load_adapter


def _layers(keys: Iterable[str]) -> str:
    """The layers of the base model whose scalings have these keys of a state_dict."""
    names = [key.partition(f".{ATTRIBUTE}.")[0] for key in keys if f".{ATTRIBUTE}." in key]
    return ", ".join(dict.fromkeys(name.removeprefix("base_model.model.") for name in names))


def _refusal(got: str) -> ValueError:
    return ValueError(
        f"adapter: expected learned scalings of the layers that the model has patched, but {got}: load the base model"
        " again, and patch it with the scaling and layers of the adapter's training before PEFT wraps it"
    )
