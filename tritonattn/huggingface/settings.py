"""The scaling of an attention module: from `patch`, or from its model's config."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..calls.checks import BACKENDS
from ..core.torch_distributed import local, rows_of_rank, unshard
from ..scaling import Scaling
from .first_use import note_use
from .scalings import check_entries, from_config, is_finite, to_config

ATTRIBUTE = "tritonattn"
LAYERS = "layers"
MARK = "needs_tritonattn"  # a tensor among saved weights, at which loaders without tritonattn stop or warn
CONFIG_MARK = {"compression_config": {"quant_method": MARK}}  # an entry of saved configs, for servers that only warn


class AppliedLayers(dict[Any, Any]):
    """Settings by layer in the config of a model that has them: its other layers have the model's scaling."""


@dataclass(frozen=True, eq=False)
class Settings:
    """The scaling of the logits of one attention module.

    scaling   as in `tritonattn.attention`; None keeps the model's
    gain      a float, or a tensor broadcastable to [Hq, 1], that multiplies the scaling
    backend, batch_invariant   as in `tritonattn.attention`
    tied      by the name of a parameter of the scaling that of the module's tensor which it is
    """

    scaling: Scaling | float | None = None
    gain: float | Tensor | None = None
    backend: str = "auto"
    batch_invariant: bool | None = None
    tied: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module) -> Settings:
        """The settings from `patch`, or else those of config.tritonattn, a dict of these fields.

        Raises ValueError for unknown entries, and RuntimeError where the config holds the settings of a patch that was
        not applied when the model was loaded.
        """
        if (layer := layer_scaling(module)) is not None:
            unshard(layer)
            return cls(layer.scaling, layer.gain, layer.backend, layer.batch_invariant)
        saved = getattr(getattr(module, "config", None), ATTRIBUTE, None)
        if saved is None:
            return cls()
        if (layers := saved_layers(saved)) is not None:
            if isinstance(layers, AppliedLayers):
                return cls()
            raise RuntimeError(
                f"config.{ATTRIBUTE} holds the scalings of {', '.join(layers)}, which were not applied to this"
                " model: load it with `import tritonattn.huggingface` before from_pretrained, into the architecture"
                " that was saved, or call tritonattn.huggingface.restore(model)"
            )
        return cls.from_config(saved)

    @classmethod
    def from_config(cls, saved: Any, heads: int | None = None, entry: str = f"config.{ATTRIBUTE}") -> Settings:
        """Settings from an entry of a config: a layer's with `heads`, or without one that holds for all layers.

        Raises ValueError naming the entry, what was expected and what came.
        """
        check_entries(entry, saved, _ENTRIES)
        backend = saved.get("backend", "auto")
        if backend not in BACKENDS:
            raise ValueError(f"{entry}.backend: expected one of {', '.join(BACKENDS)}, got {reprlib.repr(backend)}")
        gain, invariant = _gain(saved.get("gain"), heads, f"{entry}.gain"), saved.get("batch_invariant")
        if not (invariant is None or isinstance(invariant, bool)):
            raise ValueError(f"{entry}.batch_invariant: expected a bool or None, got {reprlib.repr(invariant)}")
        tied = saved.get("tied", {})
        if not isinstance(tied, dict) or not all(isinstance(name, str) for name in tied.values()):
            wanted = "expected a dict from parameters of the scaling to names in the module"
            raise ValueError(f"{entry}.tied: {wanted}, got {reprlib.repr(tied)}")
        if tied and heads is None:
            raise ValueError(f"{entry}.tied: expected none in settings of all layers, got {reprlib.repr(tied)}")
        return cls(from_config(saved.get("scaling"), heads, f"{entry}.scaling"), gain, backend, invariant, tied)


_ENTRIES = {field.name for field in fields(Settings)}  # here, since torch.compile cannot trace `fields`


class LayerScaling(nn.Module):
    """The child `tritonattn` that `patch` adds to an attention module: it holds the learned parameters.

    shared           the config of the module's model, whose attention implementation says what masks arrive
    observer         called with every computed attention: `Patched.watch`
    weights_wanted   True while the running call of the module is to return attention weights
    temporary        True if a Monitor added it, to watch a layer that is not patched
    watched          True if that Monitor is going to remove it; a copy of the model keeps it until `remove_abandoned`
    """

    def __init__(self, settings: Settings, temporary: bool = False) -> None:
        super().__init__()
        note_use()
        self.scaling = settings.scaling  # a child where it is a module
        self.gain = settings.gain
        self.backend = settings.backend
        self.batch_invariant = settings.batch_invariant
        self.tied = dict(settings.tied)
        self.shared: Any = None
        self.weights_wanted = False
        self.temporary = self.watched = temporary
        self.observer: Callable[..., None] | None = None
        self._start = None  # of a learned gain
        if isinstance(gain := settings.gain, Tensor):
            self._start = torch.ones(gain.shape, device="cpu") if gain.is_meta else gain.detach().cpu().clone()

    def reset_parameters(self) -> None:
        """Start a learned gain again from the values given; a learned scaling is a module that resets itself."""
        if self._start is not None and isinstance(self.gain, Tensor):
            with torch.no_grad():
                local(self.gain).copy_(rows_of_rank(self.gain, self._start))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out observers and watchers: a copy has none."""
        return {**self.__dict__, "observer": None, "watched": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        note_use()

    def to_config(self) -> dict[str, Any]:
        """The settings as JSON; a learned gain by its shape, its values being in the state_dict."""
        gain = self.gain
        if isinstance(gain, Tensor):
            gain = {"learned": list(gain.shape)}
        saved: dict[str, Any] = {"scaling": to_config(self.scaling), "gain": gain, "backend": self.backend}
        if self.batch_invariant is not None:
            saved["batch_invariant"] = self.batch_invariant
        return {**saved, "tied": self.tied} if self.tied else saved

    def extra_repr(self) -> str:
        scaling = "" if isinstance(self.scaling, nn.Module) else f"scaling={self.scaling!r}, "
        gain = "learned" if isinstance(self.gain, Tensor) else self.gain
        return f"{scaling}gain={gain}, backend={self.backend!r}"


def is_gain_shape(shape: Any, heads: int) -> bool:
    """True for shapes of a learned gain of a module with that many query heads."""
    return tuple(shape) in ((), (1,), (1, 1), (heads, 1))


def _gain(saved: Any, heads: int | None, entry: str) -> float | Tensor | None:
    """The gain that `LayerScaling.to_config` wrote. A learned one, which needs heads, starts at 1."""
    if saved is None or isinstance(saved, Tensor) or is_finite(saved):
        return saved
    shape = saved.get("learned") if isinstance(saved, dict) and saved.keys() == {"learned"} else None
    if heads is not None and isinstance(shape, list) and is_gain_shape(shape, heads):
        return nn.Parameter(torch.ones(shape))
    wanted = "a number or None" if heads is None else f"a number, None or {{'learned': [{heads}, 1]}}"
    raise ValueError(f"{entry}: expected {wanted}, got {reprlib.repr(saved)}")


def forget_mark(config: Any) -> None:
    """Remove CONFIG_MARK from a config that was read."""
    for name, mark in CONFIG_MARK.items():
        if vars(config).get(name) == mark:
            delattr(config, name)


def saved_layers(saved: Any) -> dict[str, Any] | None:
    """The settings by layer in a config's entry; None where it holds for all layers. Raises ValueError if damaged."""
    if not isinstance(saved, dict) or LAYERS not in saved:
        return None
    check_entries(f"config.{ATTRIBUTE}", saved, {LAYERS})
    layers = saved[LAYERS]
    if not isinstance(layers, dict) or not layers or not all(isinstance(name, str) for name in layers):
        wanted = "expected a dict from names of modules to their settings"
        raise ValueError(f"config.{ATTRIBUTE}.{LAYERS}: {wanted}, got {reprlib.repr(layers)}")
    return layers


def layer_scaling(module: nn.Module) -> Any:
    """The LayerScaling of an attention module, or the wrapper of PEFT or FSDP around it; None without."""
    return getattr(module, "_modules", {}).get(ATTRIBUTE)


def remove(module: Any) -> None:
    """Remove the temporary LayerScaling of an attention module."""
    module.config = layer_scaling(module).shared
    delattr(module, ATTRIBUTE)


def remove_abandoned(modules: Iterable[Any]) -> None:
    """Remove temporary LayerScalings that came with a copy of a watched model."""
    for module in modules:
        layer = layer_scaling(module)
        if getattr(layer, "temporary", False) and not layer.watched:
            remove(module)
