"""Calls of attention that run in the emulator, held to the bound by the check of all kernel tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

import tritonattn
from tests.kernels import harness
from tests.support.masks import MASKS, visible_pairs
from tritonattn.tuning.config import TileConfig

from .executor import padded, padded_operands

CPU = torch.device("cpu")


def _wide_sides_and_ranges(batch: int, _: int, q_len: int, k_len: int) -> dict:
    row = torch.arange(q_len)
    ranges = torch.stack([40 + row % 20, k_len - row % 9], -1).int().expand(batch, -1, -1)
    lengths = torch.full((batch,), k_len - 5)
    return {"causal": True, "window": (k_len - 40, 0), "key_lengths": lengths, "key_ranges": ranges}


# Besides the masks of all tests, those that leave whole blocks of the default tiles visible between two edges.
WIDE_MASKS = MASKS | {
    "wide window": lambda *_: {"window": (130, 70)},
    "wide sides, lengths and ranges": _wide_sides_and_ranges,
    "wide causal window": lambda *_: {"causal": True, "window": (150, None)},
    "sides, lengths and ranges": lambda *sizes: {
        "causal": True,
        "window": (150, 0),
        **MASKS["lengths"](*sizes),
        **MASKS["ranges"](*sizes),
    },
    "an entry without keys": lambda batch, _, __, k_len: {"key_lengths": torch.tensor([0, k_len])[:batch]},
}


@dataclass(frozen=True)
class Case:
    """One call: sizes, dtype, mask, scales, form, and the tiles (None: those of the default config).

    dims: D and Dv; heads: kv heads, and query heads of each; lengths: of queries and keys.
    """

    dtype: torch.dtype = torch.bfloat16
    dims: tuple[int, int] = (16, 16)
    tiles: TileConfig | None = None
    mask: str = "full"
    scales: tuple[str, ...] = ()
    form: str = "plain"
    heads: tuple[int, int] = (1, 2)
    lengths: tuple[int, int] = (37, 53)
    batch: int = 2

    def __str__(self) -> str:
        return described(self)

    def check(self, gradients: bool = True) -> None:
        """Hold the results and every gradient of backend "triton", which the emulator executes, to the bound.

        Keys and values that no row attends to are NaN.
        """
        (kv_heads, group), (q_len, k_len) = self.heads, self.lengths
        sizes = {"q_len": q_len, "k_len": k_len, "head_dim": self.dims[0], "value_dim": self.dims[1]}
        tensors, arguments = harness.of_form(
            self.form, self.dtype, CPU, scales=self.scales, batch=self.batch, kv_heads=kv_heads, group=group, **sizes
        )
        shape = self.batch, kv_heads * group, q_len, k_len
        masks = WIDE_MASKS[self.mask](*shape)
        is_hidden = ~visible_pairs(shape, **masks).any(2).any(1)[:, None, :, None]  # [B, 1, Sk, 1]
        tensors |= {name: tensors[name].masked_fill(is_hidden, torch.nan) for name in "kv"}
        arguments |= masks
        if "mask" in arguments:
            arguments["mask"] = padded(arguments["mask"])
        attend = with_padded_gradient(tritonattn.scaled_attention)
        harness.check(padded_operands(tensors), attend, scale=self.dims[0] ** -0.5, gradients=gradients, **arguments)


def with_padded_gradient(attend: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, with the gradient of its output in wider memory."""

    def call(*arguments: Any, **named: Any) -> Any:
        result = attend(*arguments, **named)
        out = result[0] if isinstance(result, tuple) else result
        if out.requires_grad:
            out.register_hook(padded)
        return result

    return call


def described(case: Any) -> str:
    """A case's fields that differ from the defaults, in short."""
    shown = [getattr(case, one.name) for one in fields(case) if getattr(case, one.name) != one.default]
    return "-".join(_short(value) for value in shown) or "default"


def _short(value: Any) -> str:
    if isinstance(value, TileConfig):
        return f"{value.block_m}x{value.block_n}w{value.num_warps}s{value.num_stages}"
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return str(value).removeprefix("torch.").replace(" ", "_")
