"""Which scaling a transformers module uses: read from its config, so saved and loaded with the model."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import nn

ATTRIBUTE = "tritonattn"


@dataclass(frozen=True)
class Settings:
    """config.tritonattn = {"scaling": ..., "gain": ..., "backend": ...}; each may be left out.

    scaling   as in `tritonattn.attention`; it replaces the model's own scaling; None keeps the model's
    gain      a float that multiplies the scaling
    backend   as in `tritonattn.attention`
    """

    scaling: Any = None
    gain: float | None = None
    backend: str = "auto"

    @classmethod
    def of(cls, module: nn.Module) -> Settings:
        """The settings in module.config, or the defaults. Raises ValueError for unknown entries."""
        own = getattr(getattr(module, "config", None), ATTRIBUTE, None)
        if own is None:
            return cls()
        names = [field.name for field in fields(cls)]
        if not isinstance(own, dict) or not set(own) <= set(names):
            raise ValueError(f"config.{ATTRIBUTE}: wanted a dict with keys out of {names}, got {own!r}")
        return cls(**own)
