"""Parameters of scalings that are tensors of the model: found by name, tied, and hidden from the model's own code."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..core.hints import shortened, type_of
from .learned import Learned, Tie

_lock = threading.Lock()


def check_parameters(parameters: Any) -> None:
    """Raise TypeError unless `parameters` is a dict from names in the model to names in the scaling."""
    items = parameters.items() if isinstance(parameters, Mapping) else [(parameters, None)]
    for name, target in items:
        if not isinstance(name, str) or not isinstance(target, str):
            got = f"{name!r}: {type_of(target)}" if isinstance(parameters, Mapping) else type_of(parameters)
            raise TypeError(
                "parameters: expected a dict from names or patterns of the model's parameters to the scaling's, such"
                f" as {{'layers.*.self_attn.ssmax_scale': 's'}}, got {got}"
            )


def tied_names(parameters: Mapping[str, str], layers: Mapping[str, tuple[Any, Any]]) -> dict[str, dict[str, str]]:
    """For each layer the parameters of its scaling that are the model's, with the name of each inside of the layer.

    parameters   names in the model, or patterns of them as in the shell, also without what comes first; each with the
                 name of a parameter of the scaling
    layers       by name the module, and its scaling

    A layer whose scaling has a named parameter must hold one tensor of that name and shape; others are left alone.
    Raises ValueError for other names, with the candidates, and TypeError for a scaling that cannot be tied.
    """
    known = {layer: _parameters_of(scaling) for layer, (_, scaling) in layers.items()}
    held = {layer: dict(module.named_parameters()) for layer, (module, _) in layers.items()}
    tied: dict[str, dict[str, str]] = {}
    for pattern, target in parameters.items():
        entry = f"parameters[{pattern!r}]"
        able = {layer: wanted[target] for layer, wanted in known.items() if target in wanted}
        if not able:
            names = dict.fromkeys(name for wanted in known.values() for name in wanted)
            expected = f"one of the scaling's parameters {', '.join(names)}" if names else "a learned scaling, 'ssmax'"
            raise ValueError(f"{entry}: expected {expected}, got {target!r}" + " of one without" * (not names))
        expected = _candidates(able, held)
        matches = [(layer, inner) for layer in able for inner in held[layer] if _matches(pattern, f"{layer}.{inner}")]
        if not matches:
            raise ValueError(f"{entry}: expected {expected}, got no match")
        for layer, inner in matches:
            before = tied.setdefault(layer, {}).setdefault(target, inner)
            if before != inner:
                raise ValueError(f"{entry}: expected {expected}, one a layer, got {before} and {inner} of {layer}")
            if not _fits(held[layer][inner], able[layer]):
                got = f"{type_of(held[layer][inner])} at {layer}.{inner}"
                raise ValueError(f"{entry}: expected {expected}, got {got}")
    for target in dict.fromkeys(parameters.values()):
        lacking = [layer for layer in known if target in known[layer] and target not in tied.get(layer, {})]
        if lacking:
            raise ValueError(
                f"parameters: expected a tensor for {target!r} in every layer with that scaling, got none in"
                f" {shortened(lacking)}: name the layers that have one by layers="
            )
    return tied


def tie_parameters(scaling: Any, layer: nn.Module, names: Mapping[str, str], entry: str = "parameters") -> None:
    """Let parameters of a scaling be tensors of a layer, by the names inside of both. Raises ValueError without one."""
    held = dict(layer.named_parameters())
    for name, inner in names.items():
        wanted = _parameters_of(scaling).get(name)
        if wanted is None or inner not in held or not _fits(held[inner], wanted):
            got = type_of(held[inner]) if inner in held else "none"
            shape = "a learned scaling's name" if wanted is None else f"a tensor of shape {list(wanted.shape)}"
            raise ValueError(f"{entry}[{name!r}]: expected {shape} at {inner!r} of {type(layer).__name__}, got {got}")
        path, _, leaf = name.rpartition(".")
        place, _, attribute = inner.rpartition(".")
        scaling.get_submodule(path).tie(leaf, Tie(layer.get_submodule(place), attribute, wanted.dim()))


class Hidden:
    """Lets a layer's own code read None where its scaling has a tensor of the layer, while the layer runs.

    Code that multiplies q where that tensor is not None then leaves the factor to the scaling. Where several threads
    run the layer at once, the tensor is hidden until the last one leaves.
    """

    def __init__(self, scaling: Any) -> None:
        parts = scaling.modules() if isinstance(scaling, nn.Module) else ()
        self.ties = [tie for part in parts if isinstance(part, Learned) for tie in part.ties.values()]
        self._running = 0

    def run(self, former: Callable, *arguments: Any, **keywords: Any) -> Any:
        """Call a forward of the layer."""
        self._enter()
        try:
            return former(*arguments, **keywords)
        except (TypeError, AttributeError) as error:
            self._explain(error)
            raise
        finally:
            self._leave()

    def hooks(self, layer: nn.Module) -> list[Any]:
        """Hide whenever the layer runs, by its hooks, whose handles these are; a copied layer has copies of them."""
        if not self.ties:
            return []
        after = layer.register_forward_hook(self._after, always_call=True)
        return [layer.register_forward_pre_hook(self._before), after]

    def _before(self, *_: Any) -> None:
        self._enter()

    def _after(self, _layer: nn.Module, _arguments: Any, out: Any) -> None:
        self._leave()
        if out is None and (error := sys.exc_info()[1]) is not None:
            self._explain(error)

    def _enter(self) -> None:
        if torch.compiler.is_compiling():
            self._hide()
            return
        with _lock:
            self._running += 1
            self._hide()

    def _leave(self) -> None:
        if torch.compiler.is_compiling():
            self._show()
            return
        with _lock:
            self._running -= 1
            if not self._running:
                self._show()

    def _hide(self) -> None:
        for tie in self.ties:
            tie.owner.__dict__[tie.attribute] = None  # found before a registered parameter

    def _show(self) -> None:
        for tie in self.ties:
            tie.owner.__dict__.pop(tie.attribute)

    def _explain(self, error: BaseException) -> None:
        if isinstance(error, (TypeError, AttributeError)) and "NoneType" in str(error):
            names = ", ".join(f"{type(tie.owner).__name__}.{tie.attribute}" for tie in self.ties)
            error.args = (
                f"{error}: parameters: expected code that multiplies q only where {names} is not None, since the"
                " scaling does it now, got code that reads it always: leave that factor out of the model's code",
            )


def _parameters_of(scaling: Any) -> dict[str, Tensor]:
    """The parameters of a scaling that can be tied, by name."""
    return dict(_named(scaling)) if isinstance(scaling, nn.Module) else {}


def _named(scaling: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, part in scaling.named_modules():
        for name, x in part.named_parameters(recurse=False):
            if not isinstance(part, Learned):
                raise TypeError(
                    f"parameters: expected a scaling that extends tritonattn.nn.Learned, got {type(part).__name__}"
                )
            yield f"{path}.{name}".removeprefix("."), x


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _fits(x: Tensor, wanted: Tensor) -> bool:
    """True for a floating tensor of the shape, or of one number a head with further axes of 1."""
    one_axis = wanted.dim() == 1 and x.dim() > 0 and x.numel() == wanted.numel() == max(x.shape)
    return x.is_floating_point() and (x.shape == wanted.shape or one_axis)


def _candidates(able: Mapping[str, Tensor], held: Mapping[str, Mapping[str, Tensor]]) -> str:
    """The tensors of layers that a parameter of their scalings can be."""
    names = [f"{layer}.{inner}" for layer in able for inner, x in held[layer].items() if _fits(x, able[layer])]
    shape = list(next(iter(able.values())).shape)
    return f"a tensor of shape {shape}, {shortened(names)}" if names else f"a tensor of shape {shape}, which none has"
