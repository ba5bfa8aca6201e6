"""Checks of the sizes and inputs of an attention layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..calls.checks import FLOATS, check_count, check_tensor, shape_of
from ..core.autograd import autocast_is_on
from ..core.hints import nearest, type_of

GATES = ("elementwise", "headwise")


def check_gate(gate: Any) -> None:
    """Raise unless gate is None or in GATES."""
    if gate is not None and not isinstance(gate, str):
        raise TypeError(f"gate: expected 'elementwise', 'headwise' or None, got {type_of(gate)}")
    if gate is not None and gate not in GATES:
        raise ValueError(f"gate: expected 'elementwise', 'headwise' or None, got {gate!r}{nearest(gate, GATES)}")


def checked_head_dim(width: Any, heads: Any, kv_heads: Any, head_dim: Any, context_width: Any) -> int:
    """D of a layer. Raises TypeError or ValueError for sizes that do not describe one."""
    sizes = {"width": width, "heads": heads, "kv_heads": kv_heads, "context_width": context_width}
    for name, size in (sizes if head_dim is None else sizes | {"head_dim": head_dim}).items():
        check_count(name, size, 1)
    if heads % kv_heads != 0:
        raise ValueError(f"kv_heads: expected a divisor of heads = {heads}, got {kv_heads}")
    if head_dim is None and width % heads != 0:
        raise ValueError(f"head_dim: expected an int where heads = {heads} do not divide width = {width}, got None")
    return width // heads if head_dim is None else head_dim


def check_features(name: str, x: Any, axes: str, width: int) -> None:
    """Raise unless x is a floating tensor of these axes, of which the last is `width`."""
    check_tensor(name, x, axes)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
    if x.dim() != axes.count(",") + 1 or x.shape[-1] != width:
        raise ValueError(f"{name}: expected {axes}, got {shape_of(x)}")


def check_projected(name: str, x: Tensor, projection: nn.Module) -> None:
    """Raise TypeError where a projection of torch's would meet another dtype; other projections may cast."""
    if type(projection) is not nn.Linear or autocast_is_on(x):
        return
    if x.dtype != (dtype := projection.weight.dtype) and dtype in FLOATS:
        raise TypeError(f"{name}: expected the layer's {dtype}, got {x.dtype}; cast it or the layer, or use autocast")
