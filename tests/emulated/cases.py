"""What is run in the emulator: every form of attention as one more entry of FORMS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

import tritonattn
from tests.kernels.harness import Tensors, inputs
from tests.support.masks import MASKS
from tritonattn.tuning.config import TileConfig

from .executor import padded

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Form:
    """A way to call attention: attend(**tensors, **arguments) gives out, or (out, aux); extra: its further tensors."""

    attend: Callable[..., Any]
    extra: Callable[[Case], Tensors] = lambda case: {}


@dataclass(frozen=True)
class Case:
    """One call: sizes, dtype, mask, scales, form, and the tiles (None: those of the default config)."""

    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 16
    value_dim: int | None = None
    tiles: TileConfig | None = None
    mask: str = "full"
    scales: tuple[str, ...] = ()
    form: str = "plain"
    kv_heads: int = 1
    group: int = 2
    q_len: int = 37
    k_len: int = 53
    batch: int = 2

    def __str__(self) -> str:
        """What differs from the defaults, in short."""
        shown = [getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default]
        return "-".join(_short(value) for value in shown) or "default"

    @property
    def arguments(self) -> dict[str, Any]:
        """Mask arguments, and a scale for the constant mode."""
        masks = MASKS[self.mask](self.batch, self.kv_heads * self.group, self.q_len, self.k_len)
        return masks | {"scale": self.head_dim**-0.5}

    def tensors(self) -> Tensors:
        """The operands, in padded memory."""
        tensors = inputs(
            self.dtype, CPU, batch=self.batch, kv_heads=self.kv_heads, group=self.group, q_len=self.q_len,
            k_len=self.k_len, head_dim=self.head_dim, value_dim=self.value_dim or self.head_dim, scales=self.scales,
        )  # fmt: skip
        tensors |= FORMS[self.form].extra(self)
        return {name: padded(tensor) for name, tensor in tensors.items()}


def _short(value: Any) -> str:
    if isinstance(value, TileConfig):
        return f"{value.block_m}x{value.block_n}w{value.num_warps}s{value.num_stages}"
    if isinstance(value, tuple):
        return "+".join(value)
    return str(value).removeprefix("torch.").replace(" ", "_")


FORMS = {"plain": Form(tritonattn.scaled_attention)}
