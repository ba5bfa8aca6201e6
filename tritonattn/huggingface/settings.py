"""Which scaling an attention module uses: from `patch`, or from its model's config."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..scaling import Scaling
from .scalings import described, restored

ATTRIBUTE = "tritonattn"
LAYERS = "layers"
LENT: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # those that a Monitor has lent and is going to take back


@dataclass(frozen=True, eq=False)
class Settings:
    """What one attention module does with its logits.

    scaling   as in `tritonattn.attention`; None keeps the model's own
    gain      a float, or a tensor broadcastable to [Hq, 1], that multiplies the scaling
    backend   as in `tritonattn.attention`
    """

    scaling: Scaling | float | None = None
    gain: float | Tensor | None = None
    backend: str = "auto"

    @classmethod
    def of(cls, module: nn.Module) -> Settings:
        """Those that `patch` gave the module, or else those of config.tritonattn, a dict of these fields.

        Raises ValueError for unknown entries, and RuntimeError where the config holds the settings of a patch that was
        not applied when the model was loaded.
        """
        own = layer_scaling(module)
        if own is not None:
            return cls(own.scaling, own.gain, own.backend)
        saved = getattr(getattr(module, "config", None), ATTRIBUTE, None)
        return cls() if saved is None else cls.read(saved)

    @classmethod
    def read(cls, saved: Any) -> Settings:
        """From the dict of a config that holds for all layers."""
        if isinstance(saved, dict) and LAYERS in saved:
            raise RuntimeError(
                f"config.{ATTRIBUTE} holds the scalings of {', '.join(saved[LAYERS])}, which were not applied to this"
                " model: load it with `import tritonattn.huggingface` before from_pretrained, into the architecture"
                " that was saved, or call tritonattn.huggingface.restore(model)"
            )
        names = [field.name for field in fields(cls)]
        if not isinstance(saved, dict) or not set(saved) <= set(names):
            raise ValueError(f"config.{ATTRIBUTE}: wanted a dict with keys out of {names}, got {saved!r}")
        return cls(restored(saved.get("scaling")), saved.get("gain"), saved.get("backend", "auto"))


class LayerScaling(nn.Module):
    """What `patch` adds to an attention module, as its child `tritonattn`: it owns what is learned.

    shared           the config of the module's model, whose attention implementation says what masks arrive
    observer         called with what every call computed, see `Patched.watch`
    weights_wanted   whether the running call of the module is to return attention weights
    lent             whether it is there for a while, so that a Monitor can see a layer that is not patched; a copy of
                     the model keeps it until `take_back`
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.scaling = settings.scaling  # a child where it is a module
        self.gain = settings.gain
        self.backend = settings.backend
        self.shared: Any = None
        self.weights_wanted = False
        self.lent = False
        self.observer: Callable[..., None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not observed."""
        return {**self.__dict__, "observer": None}

    def saved(self) -> dict[str, Any]:
        """The settings as JSON; a learned gain by its shape, its values being in the state_dict."""
        gain = self.gain
        if isinstance(gain, Tensor):
            gain = {"learned": list(gain.shape)}
        return {"scaling": described(self.scaling), "gain": gain, "backend": self.backend}

    @classmethod
    def from_saved(cls, saved: dict[str, Any], heads: int) -> LayerScaling:
        gain = saved.get("gain")
        if isinstance(gain, dict):
            gain = nn.Parameter(torch.ones(gain["learned"]))
        return cls(Settings(restored(saved.get("scaling"), heads), gain, saved.get("backend", "auto")))

    def extra_repr(self) -> str:
        scaling = "" if isinstance(self.scaling, nn.Module) else f"scaling={self.scaling!r}, "
        gain = "learned" if isinstance(self.gain, Tensor) else self.gain
        return f"{scaling}gain={gain}, backend={self.backend!r}"


def layer_scaling(module: nn.Module) -> Any:
    """What `patch` added to an attention module: its LayerScaling, or what PEFT or FSDP has wrapped around that."""
    return getattr(module, "_modules", {}).get(ATTRIBUTE)


def take_back(module: Any) -> None:
    """Remove what a Monitor has lent to an attention module."""
    module.config = layer_scaling(module).shared
    delattr(module, ATTRIBUTE)


def take_back_copies(modules: Iterable[Any]) -> None:
    """Remove what a Monitor has lent to the attention modules that these are copies of."""
    for module in modules:
        own = layer_scaling(module)
        if getattr(own, "lent", False) and own not in LENT:
            take_back(module)
