"""`patch`: give some or all attention layers of a model another logit scaling, and undo it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from typing import Any

from tabulate import tabulate
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calls.checks import Backend, check_bool, check_settings
from ..calls.public import public
from ..core.hints import shortened
from ..core.optimizers import expect_steps
from ..core.torch_distributed import refuse_wrapped
from ..nn.registry import largest_base
from ..nn.tied import Hidden, check_parameters, tie_parameters, tied_names
from ..scaling import Scaling, SqrtDim
from ..scaling.names import LayerMode
from .architecture import (
    AttentionModule,
    attention_modules,
    head_dim,
    key_heads,
    layer_type,
    outermost_models,
    query_heads,
    refuse_unsupported,
)
from .attention import NAME, note_wanted_weights
from .configs import IMPLEMENTATION, SAVED_IMPLEMENTATION, PatchedConfigs, install, state_masks
from .ignored import warn_of_ignored
from .kinds import window_size
from .scalings import make_scaling, to_config
from .selection import Selector, wishes_of
from .settings import (
    ATTRIBUTE,
    LAYERS,
    MARK,
    AppliedLayers,
    LayerScaling,
    Settings,
    is_gain_shape,
    layer_scaling,
    remove_abandoned,
)

_HANDLE = "_tritonattn_patched"
_MASKS = ("eager", "sdpa", NAME)


class Patched:
    """The handle of a patch: report it, watch it, undo it. A context manager that undoes at its end.

    mark   True, the default: save_pretrained adds the tensor "needs_tritonattn" to the weights, so that programs that
           do not know tritonattn stop or warn instead of computing with another scaling
    """

    def __init__(
        self, model: nn.Module, found: list[AttentionModule], chosen: set[str], configs: PatchedConfigs
    ) -> None:
        self.model = model
        self.mark = True
        self._found, self._chosen, self._configs = found, chosen, configs
        self._before = {one.name: _implementation(one.module) for one in found}
        self._former: list[tuple[Any, Any]] = []  # modules and their configs before
        self._hooks: list[Any] = []

    def __repr__(self) -> str:
        """The scaling, gain and backend of layers, by their numbers, or names without one."""
        layers, groups = self.layers, {}
        for one in self._found:
            if (layer := layers.get(one.name)) is not None:
                known = groups.setdefault(f"{_summary(layer)}, backend {layer.backend}", {})
                known[one.name if one.number is None else str(one.number)] = None  # a set in order
        parts = [f"{text}, layers {', '.join(known)}" for text, known in groups.items()]
        return f"<Patched {type(self.model).__name__}: {'; '.join(parts) or 'undone'}>"

    @property
    def layers(self) -> dict[str, LayerScaling]:
        """The settings of every patched module, by the module's name; empty after `undo`."""
        chosen = {one.name: layer_scaling(one.module) for one in self._found if one.name in self._chosen}
        return {name: layer for name, layer in chosen.items() if layer is not None}

    def report(self) -> str:
        """A table with a row for each attention module: layer type, former implementation, and scaling or obstacle."""
        layers, rows = self.layers, []
        for one in self._found:
            if (layer := layers.get(one.name)) is not None:
                scaling = _summary(layer) + f", {layer.backend}" * (layer.backend != "auto")
            else:
                asked = "undone" if one.name in self._chosen else "not among the layers asked for"
                scaling = f"left alone: {one.obstacle or asked}"
            rows.append((one.name, *_shape(one), self._before[one.name] or "built in", scaling))
        headers = ("module", "layer type", "heads", "head_dim", "before", "scaling")
        return tabulate(rows, headers, "simple", disable_numparse=True)

    @contextmanager
    def watch(self, observer: Callable[[nn.Module, Tensor, Tensor, dict[str, Any], Any], None]):
        """While the context lasts, call observer(module, query, key, arguments, aux) for every attention computed.

        query [B, Hq, Q, D] and key [B, Hkv, K, D] come from the module, arguments are those of `tritonattn.attention`,
        and aux is its `AttentionAux`.
        """
        before = [(layer, layer.observer) for layer in self.layers.values()]
        for layer, _ in before:
            layer.observer = observer
        try:
            yield self
        finally:
            for layer, observer_before in before:
                layer.observer = observer_before

    def undo(self) -> None:
        """Restore modules, parameters, hooks and configs as they were before. Repeating it is harmless."""
        for hook in self._hooks:
            hook.remove()
        for module, config in self._former:
            delattr(module, ATTRIBUTE)
            module.config = config
        self._configs.undo()
        self._hooks, self._former = [], []
        self.model.__dict__.pop(_HANDLE, None)

    def __enter__(self) -> Patched:
        if patched(self.model) is not self:
            raise RuntimeError("this patch has been undone: call tritonattn.huggingface.patch again")
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


@public()
def patch(
    model: nn.Module,
    scaling: LayerMode | Scaling | type[Scaling] | float | None = "sqrt_dim",
    layers: Selector | Iterable[Selector] | Mapping[Selector, Any] | None = None,
    *,
    gain: float | Tensor | None = None,
    backend: Backend = "auto",
    batch_invariant: bool | None = None,
    parameters: Mapping[str, str] | None = None,
) -> Patched:
    """Compute attention layers of a transformers model by `tritonattn.attention`, with another scaling.

        logit = model_scaling * sqrt(D) * gain * factor * (q . k)

    factor is the mode's; model_scaling is the model's factor of q . k, usually 1 / sqrt(D). So "sqrt_dim" gives
    the model as it was, and factors beyond 1 / sqrt(D) are kept (query_pre_attn_scalar, YaRN's, a q scaled beforehand
    as in Whisper and OPT). A scaling that normalises q, "cosine", replaces the model's.

    Args:
        model: A transformers model whose attention goes through transformers' AttentionInterface, a module that wraps
            one (PEFT's), or a part of one, such as one layer. Layers go by their names in this module.
        scaling: A name in `tritonattn.SCALINGS` or `tritonattn.nn.LEARNED`, a `Scaling`, a class of them, or a float.
            A learned name or a class of modules is made for every layer with its number of query heads; those of
            nn.LEARNED start at sqrt_dim, where the model is (learned_cosine cannot). "log_key_count:8192" and
            "ssmax:8192" have that base. An nn.Module is copied for every layer with its start. The names of models'
            factors, such as llama4, take their settings from the model's config, where it has them. None keeps the
            model's.
        layers: The modules to patch. None is all; a layer's number, from 0, or from the end, -1 being the last (in
            encoder-decoders both layers of that number); a name, the name of a module above, or a pattern of names as
            in the shell; "global", the layers over all keys, without a window, or "without positions", those that turn
            neither q nor k by positions (NoPE), where config and code of the model say so; several of these; or a dict
            from these to a scaling or to {"scaling": ..., "gain": ..., "backend": ...}, where later entries win.
        gain: A float, or a tensor broadcastable to [Hq, 1], such as torch.ones(heads, 1), of which every layer gets a
            learned copy as parameter.
        backend, batch_invariant: As in `tritonattn.attention`.
        parameters: Tensors of the model that are parameters of the scaling: a dict from their names, or patterns of
            them, to the scaling's, {"layers.*.self_attn.ssmax_scale": "s"}; one a layer, [Hq] or with further axes of
            1. They stay the model's: the same objects under the same names, trained, saved and loaded as before. The
            model's own code reads None in their place until `undo`, and so has to multiply q only where they are not
            None. "ssmax" then is s ln(n) / sqrt(D), with b where that is named too. A checkpoint with tensors of that
            kind, "ssmax" in their names, which the model does not have, is warned of.

    Learned values become parameters of the attention modules, in `Patched.layers[name].scaling`, so make the optimizer,
    and wrap the model in PEFT, DDP or FSDP or shard it, afterwards. The settings become part of model.config, which is
    a copy until `undo`, since other models may share the original. save_pretrained, of the model or of one that holds
    it, keeps both, and from_pretrained applies them again where `tritonattn.huggingface` has been imported, and fails
    where it has not.

    A layer whose window is below the base of a log_key_count, log_power, SSMax or LearnedLogPower keeps sqrt_dim, with
    a warning: its n would stay below the base, and its logits be smaller for good.

    Layers that are left out keep their implementation and masks. If all layers are patched, masks are ranges of
    keys and O(Q); otherwise they are those of the model's implementation, which must be "eager" or "sdpa".

    Returns:
        A `Patched`. Until its `undo()`, `model.set_attn_implementation` does not change patched layers.

    Raises:
        TypeError, ValueError: A model without attention that can be patched, one that is patched already, or, for
            learned values, one that is wrapped, sharded or adapted by PEFT already; a layer that does not exist; an
            argument.
        NotImplementedError: A chosen layer that cannot be patched (Bloom's takes no attention function), and why.

    >>> import torch, transformers, tritonattn.huggingface
    >>> config = transformers.LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    ...     num_attention_heads=2, vocab_size=50)
    >>> model = transformers.LlamaForCausalLM(config)
    >>> with tritonattn.huggingface.patch(model, scaling="qwen_logn", layers=[1]) as patched:
    ...     out = model(torch.ones(1, 5, dtype=torch.int64)).logits
    """
    found = _patchable_modules(model)
    if batch_invariant is not None:
        check_bool("batch_invariant", batch_invariant)
    if parameters is not None:
        check_parameters(parameters)
    warn_of_ignored(model, found)
    wishes = wishes_of(found, layers, {"scaling": scaling, "gain": gain, "backend": backend})
    asked = [one for one in found if one.name in wishes]
    targets = set((parameters or {}).values())
    settings = {one.name: _settings(one.module, batch_invariant, targets, **wishes[one.name]) for one in asked}
    plans = {name: LayerScaling(one) for name, one in _within_windows(asked, settings).items()}
    modules = {one.name: one.module for one in asked}
    tied = tied_names(parameters or {}, {name: (modules[name], plan.scaling) for name, plan in plans.items()})
    for name, names in tied.items():
        tie_parameters(plans[name].scaling, modules[name], names)
        plans[name].tied = names
    return apply(model, found, plans, copied=True)


def patched(model: nn.Module) -> Patched | None:
    """The `Patched` of a model, also of one that was loaded with its patch.

    A module that wraps a patched transformers model (PEFT's, DDP, torch.compile's) has that model's.

    Args:
        model: A transformers model, a module that wraps one, or a part of one.

    Returns:
        The handle that `patch` returned, or None if the model is not patched.

    >>> import transformers, tritonattn.huggingface
    >>> config = transformers.LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    ...     num_attention_heads=2, vocab_size=50)
    >>> model = transformers.LlamaForCausalLM(config)
    >>> with tritonattn.huggingface.patch(model, scaling="key_count") as handle:
    ...     tritonattn.huggingface.patched(model) is handle
    True
    """
    inside = [one.__dict__[_HANDLE] for one in outermost_models(model).values() if _HANDLE in one.__dict__]
    return model.__dict__.get(_HANDLE, inside[0] if len(inside) == 1 else None)


def apply(model: nn.Module, found: list[AttentionModule], plans: dict[str, LayerScaling], copied: bool) -> Patched:
    """Put the plans, by module name, into a model, and into its configs or, if copied, into copies of them."""
    if learned := [name for name, plan in plans.items() if next(plan.parameters(), None) is not None]:
        refuse_wrapped(model, f"modules_to_save=[{ATTRIBUTE!r}]")
    # Configs of modules that stay as they are; of a part of a model the rest is not known.
    shared = {id(one.config) for one in found if one.name not in plans or one.saved_name is None}
    whole = {id(one.config) for one in found} - shared
    _check_masks(one.config for one in found if one.name in plans and id(one.config) in shared)
    configs = PatchedConfigs(model, _configs(model, found, plans, not shared), copied)
    result = Patched(model, found, set(plans), configs)
    for original, config in zip(configs.originals, configs.writable, strict=True):
        if not shared or id(original) in whole:  # then masks are tritonattn's
            setattr(config, IMPLEMENTATION, NAME)
    for one in found:
        is_left = one.obstacle is None and shared and _implementation(one.module) == NAME
        layer = plans.get(one.name, LayerScaling(Settings()) if is_left else None)
        if layer is not None:
            result._former.append((one.module, one.module.config))
            install(one.module, layer, NAME)
            result._hooks += Hidden(layer.scaling).hooks(one.module)
            if one.keeps_output_attentions:
                result._hooks.append(one.module.register_forward_pre_hook(note_wanted_weights, with_kwargs=True))
    for root in outermost_models(model).values():
        inside = {id(module) for module in root.modules()}
        patched_inside = [one for one in found if one.name in plans and id(one.module) in inside]
        if saved := AppliedLayers({one.saved_name: plans[one.name].to_config() for one in patched_inside}):
            setattr(root.config, ATTRIBUTE, {LAYERS: saved})
            setattr(root.config, SAVED_IMPLEMENTATION, NAME)
        result._hooks.append(root.register_load_state_dict_pre_hook(_take_mark))
    state_masks(model)
    model.__dict__[_HANDLE] = result
    expect_steps([one.module for one in found if one.name in learned], _added)
    return result


def _added(module: Any) -> Iterable[nn.Parameter]:
    """The parameters that a patch has added to an attention module."""
    return () if (layer := layer_scaling(module)) is None else layer.parameters()


def _take_mark(_: nn.Module, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
    """Let load_state_dict take weights that save_pretrained has marked."""
    state_dict.pop(f"{prefix}{MARK}", None)


def _implementation(module: Any) -> str | None:
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def _patchable_modules(model: Any) -> list[AttentionModule]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    found = attention_modules(model)
    remove_abandoned(one.module for one in found)
    if any(getattr(layer_scaling(one.module), "watched", False) for one in found):
        raise RuntimeError("model: expected one that no Monitor is watching: call patch() before `with monitor:`")
    if any(layer_scaling(one.module) is not None for one in found):
        raise ValueError(
            f"model: expected one that is not patched, got a patched {type(model).__name__}: undo() that first, or give"
            " all layers in one call, layers={10: ..., 11: ...}"
        )
    if not found:
        raise ValueError(
            f"model: expected a transformers model, got {type(model).__name__}: no attention module was found in it;"
            " for other libraries' there is tritonattn.integrations"
        )
    refuse_unsupported(model, found)
    return found


def _settings(
    module: Any, batch_invariant: bool | None, tied: set[str], scaling: Any, gain: Any, backend: Any
) -> Settings:
    """The settings of one module, with copies of what is learned."""
    check_settings(backend)
    heads = query_heads(module)
    if isinstance(gain, Tensor):
        if not gain.is_floating_point():
            raise TypeError(f"gain: expected a float or a tensor of a floating dtype, got {gain.dtype}")
        if not is_gain_shape(gain.shape, heads):
            wanted = f"a tensor broadcastable to [Hq, 1] = [{heads}, 1]"
            raise ValueError(f"gain: expected {wanted}, got {list(gain.shape)}")
        copied = gain.detach().clone()
        gain = nn.Parameter(copied.reshape(1) if gain.dim() == 0 else copied)  # FSDP takes no parameter without an axis
    elif gain is not None:
        if isinstance(gain, bool) or not isinstance(gain, Real):
            raise TypeError(f"gain: expected a float or a tensor, got {type(gain).__name__}")
        gain = float(gain)
    scaling = make_scaling(scaling, heads, module.config, tied)
    to_config(scaling)  # refuse now, not at save_pretrained
    return Settings(scaling, gain, backend, batch_invariant)


def _within_windows(layers: list[AttentionModule], settings: dict[str, Settings]) -> dict[str, Settings]:
    """The settings, with sqrt_dim where n cannot reach the base of ln(n); warns of these layers."""
    kept, left = dict(settings), []
    for one in layers:
        window, base = window_size(one), largest_base(settings[one.name].scaling)
        if window is not None and base > window:
            kept[one.name] = replace(settings[one.name], scaling=SqrtDim())
            left.append(f"{one.name} (base {base:g}, window {window})")
    if left:
        warnings.warn(
            f"scaling: expected a base of at most the layer's window, got {shortened(left)}: n would stay below it and"
            " logits be smaller for good; these layers keep sqrt_dim, as they do with layers='global'",
            stacklevel=4,
        )
    return kept


def _check_masks(configs: Iterable[Any]) -> None:
    """Refuse configs of models of which a part is patched, and whose masks only their implementation can read."""
    for config in configs:
        if config._attn_implementation not in (None, *_MASKS):
            raise ValueError(
                f"layers: expected an attention implementation out of {', '.join(_MASKS)} if only some layers are"
                f" patched, got {config._attn_implementation!r}: call model.set_attn_implementation('sdpa') first"
            )


def _configs(model: nn.Module, found: list[AttentionModule], plans: dict[str, LayerScaling], is_whole: bool) -> list:
    """The configs, each once, of outermost models, of patched modules and, if all is patched, of the models inside."""
    configs = [root.config for root in outermost_models(model).values()]
    configs += [one.module.config for one in found if one.name in plans]
    if is_whole:
        configs += [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    return list({id(config): config for config in configs}.values())


def _shape(found: AttentionModule) -> tuple[str, str, str]:
    """Layer type, heads and head dim for the report."""
    if found.obstacle is not None:
        return "-", "-", "-"
    module = found.module
    heads, keys = query_heads(module), key_heads(module)
    return layer_type(found), f"{heads}" if heads == keys else f"{heads}/{keys}", str(head_dim(module) or "-")


def _summary(layer: LayerScaling) -> str:
    scaling = to_config(layer.scaling)
    text = "the model's" if scaling is None else str(scaling)
    if isinstance(scaling, dict):
        parameters = ", ".join(f"{key}={value}" for key, value in scaling.items() if key != "name")
        text = f"{scaling['name']}({parameters})"
    if layer.gain is not None:
        text += ", learned gain" if isinstance(layer.gain, Tensor) else f", gain {layer.gain:g}"
    return text + "".join(f", {name} from {inner}" for name, inner in layer.tied.items())
