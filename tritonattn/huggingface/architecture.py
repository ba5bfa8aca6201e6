"""Find a model's attention modules by the code that calls AttentionInterface, and read their sizes."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"


@dataclass(frozen=True, eq=False)
class AttentionModule:
    """An attention module of a model.

    name         in the model that was searched
    module       an nn.Module, whose attributes differ from model to model
    saved_name   in the outermost transformers model that holds it: shorter than name if that model is wrapped, and None
                 if the search began inside it
    inner        the innermost transformers model that holds it, or None
    obstacle     the reason why it cannot be patched, or None
    """

    name: str
    module: Any
    saved_name: str | None
    inner: Any = None
    obstacle: str | None = None

    @property
    def config(self) -> Any:
        """The config that decides its masks: the module's, else that of the model around it."""
        config = getattr(self.module, "config", None)
        return getattr(self.inner, "config", None) if config is None else config

    @property
    def number(self) -> int | None:
        """The number of its layer, from 0."""
        return layer_number(self.saved_name or self.name)

    @property
    def stack(self) -> str:
        """The name before the number: an encoder and a decoder number their layers each."""
        return f".{self.saved_name or self.name}".partition(f".{self.number}.")[0]

    @property
    def keeps_output_attentions(self) -> bool:
        """True where the module takes output_attentions and does not pass it on."""
        passed = interface_keywords(type(self.module))
        taken = "output_attentions" in inspect.signature(self.module.forward).parameters
        return taken and passed is not None and "output_attentions" not in passed


def layer_number(name: str) -> int | None:
    """The number of an attention module's layer, from 0: the first number in its name; None without one."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def outermost_models(model: nn.Module) -> dict[str, Any]:
    """The transformers models in a model that lie in no other, by name: the model itself, or those that it wraps."""
    outermost: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(_holds(outer, name) for outer in outermost):
            outermost[name] = module
    return outermost


def attention_modules(model: nn.Module) -> list[AttentionModule]:
    """The attention modules of a model in its order, with an obstacle if they cannot be patched."""
    modules = dict(model.named_modules())
    models = [name for name, module in modules.items() if isinstance(module, PreTrainedModel)]
    calling = {name for name, module in modules.items() if interface_keywords(type(module)) is not None}
    found: list[AttentionModule] = []
    for name, module in modules.items():
        if name in calling:
            obstacle = _obstacle(module)
        elif not re.search("Attention|SelfAttn", type(module).__name__) or any(
            _holds(name, other) or _holds(other, name) for other in (*calling, *(one.name for one in found))
        ):
            continue
        else:
            obstacle = "takes no attention from transformers' AttentionInterface"
        around = [outer for outer in models if _holds(outer, name)]  # from the outermost in
        saved_name = name.removeprefix(around[0]).removeprefix(".") if around else None
        found.append(AttentionModule(name, module, saved_name, modules[around[-1]] if around else None, obstacle))
    return found


def refuse_unsupported(model: nn.Module, found: list[AttentionModule]) -> None:
    """Raise NotImplementedError if none of the attention modules of a model can be patched."""
    if found and all(one.obstacle is not None for one in found):
        reasons = sorted({f"{type(one.module).__name__} {one.obstacle}" for one in found})
        raise NotImplementedError(f"model: tritonattn cannot patch {type(model).__name__}: {'; '.join(reasons)}")


@functools.cache
def interface_keywords(cls: type) -> frozenset[str] | None:
    """The keywords that a class's code passes to AttentionInterface; None if the class does not call it."""
    if interface_function(cls) is None:
        return None
    if (tree := parsed(cls)) is None:  # no source: an argument is refused when it comes
        return frozenset()
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    passed = [
        keyword
        for call in calls
        if getattr(call.func, "id", None) == "attention_interface"
        for keyword in call.keywords
        if keyword.arg is not None and ast.unparse(keyword.value) != "None"
    ]
    return frozenset(str(keyword.arg) for keyword in passed)


@functools.cache
def parsed(cls: type) -> ast.Module | None:
    """The code of `interface_function`; None without one, and without its source."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(interface_function(cls))))
    except (OSError, TypeError, SyntaxError):
        return None


@functools.cache
def interface_function(cls: type) -> Any:
    """The method of a class that calls AttentionInterface, as a function; None if none does."""
    if issubclass(cls, PreTrainedModel):  # names the interface, to choose an implementation
        return None
    methods = (inspect.unwrap(method) for _, method in inspect.getmembers(cls, inspect.isfunction))
    return next((one for one in methods if inspect.isfunction(one) and _INTERFACE in one.__code__.co_names), None)


def _obstacle(module: nn.Module) -> str | None:
    passed = interface_keywords(type(module)) or frozenset()
    if "indices" in passed:
        return "selects keys by an indexer"
    if "AttentionResidual" in type(module).__name__:
        return "attends to the outputs of layers, not to tokens"
    # GPT-2 up to transformers 4: only its eager attention reads these.
    if passed and "scaling" not in passed:
        if getattr(module, "scale_attn_by_inverse_layer_idx", False) or not getattr(module, "scale_attn_weights", True):
            return (
                "scale_attn_by_inverse_layer_idx, scale_attn_weights: it scales its logits without passing a scaling on"
            )
    if getattr(module, "config", None) is None:
        return "has no config that names its attention implementation"
    return None


def _holds(outer: str, inner: str) -> bool:
    """True where the module `outer` ("" is the root) is `inner` or holds it."""
    return not outer or f"{inner}.".startswith(f"{outer}.")


def query_heads(module: Any) -> int:
    """Hq. Raises ValueError if neither the module nor its config has it."""
    heads = _first(module, ("num_heads", "num_attention_heads", "n_heads", "n_head"), "num_attention_heads")
    if heads is None:
        raise ValueError(f"{type(module).__name__}: expected a number of heads in it or its config, got none")
    return heads


def key_heads(module: Any) -> int:
    """Hkv; by default as many as query heads."""
    if isinstance(groups := getattr(module, "num_key_value_groups", None), int):
        return query_heads(module) // groups
    return _first(module, ("num_key_value_heads", "num_kv_heads"), "") or query_heads(module)


def head_dim(module: Any) -> int | None:
    """D, or None if neither the module nor its config has it."""
    size = _first(module, ("head_dim", "attention_head_size", "qk_head_dim", "head_size"), "head_dim")
    if size is not None:
        return size
    width = getattr(module.config, "hidden_size", None)
    return width // query_heads(module) if isinstance(width, int) else None


def layer_type(found: AttentionModule) -> str:
    """The model's name of the layer's type, or "cross_attention", "sliding_attention" or "full_attention"."""
    module = found.module
    names = f"{type(module).__name__}.{found.name.rpartition('.')[2]}"
    if re.search("cross|encoder_attn", names, re.IGNORECASE) or getattr(module, "is_cross_attention", False):
        return "cross_attention"
    if (kind := entry_of_layer(found, "layer_types")) is not None:
        return kind
    is_passed = "sliding_window" in (interface_keywords(type(module)) or ())
    default = getattr(found.config, "sliding_window", None) if is_passed else None
    return "sliding_attention" if getattr(module, "sliding_window", default) else "full_attention"


def entry_of_layer(found: AttentionModule, name: str) -> Any:
    """The entry of a layer in a list of the model's config; None without one."""
    entries, index = getattr(found.config, name, None), getattr(found.module, "layer_idx", None)
    if not isinstance(entries, (list, tuple)) or not isinstance(index, int):
        return None
    return entries[index] if index < len(entries) else None


def _first(module: Any, names: tuple[str, ...], config_name: str) -> int | None:
    values = [*(getattr(module, name, None) for name in names), getattr(module.config, config_name, None)]
    return next((value for value in values if type(value) is int and value > 0), None)
