"""Gradients that are sums over tiles."""

from __future__ import annotations

from torch import Tensor

from ...core.terms import PAIRS, Gradients, Needs
from .tiles import Block, Heads, Tiles


def allocated(tiles: Tiles, needs: Needs) -> Gradients:
    """Zeros for the gradients that `needs` asks for: those of pairs in the dtype of tiles, others as their tensors."""
    return Gradients(
        *(
            x.new_zeros(x.shape, dtype=tiles.dtype if name in PAIRS else None) if need and x is not None else None
            for name, x, need in zip(Gradients._fields, tiles.call.tensors(), needs, strict=True)
        )
    )


def rounded(tiles: Tiles, gradients: Gradients) -> Gradients:
    """The gradients with those of pairs, sums over tiles, rounded once."""
    found = {}
    for name in PAIRS:
        x, gradient = getattr(tiles.call.terms, name), getattr(gradients, name)
        found[name] = None if gradient is None else gradient.to(x.dtype)
    return gradients._replace(**found)


def add_biases(tiles: Tiles, block: Block, keys: slice, d_bias: Tensor, gradients: Gradients) -> None:
    """Add the gradients of a tile's logits where biases are added to them: [N, G * rows, keys]."""
    if gradients.key_bias is not None:
        target = gradients.key_bias[block.heads.batch, block.heads.keys, :, keys]
        target += tiles.sum(tiles.by_head(d_bias, block).mT)[..., : target.shape[-1], 0]
    if not (gradients.bias is None and gradients.relative_bias is None):
        tiles.add_gradients_of_pairs(d_bias, block, keys, gradients)


def sums_over_rows(tiles: Tiles, heads: Heads, x: Tensor) -> Tensor:
    """Zeros for sums over the rows of some heads, for x [B, Hkv, Sk, C]: [N, Sk, C]."""
    entries = (heads.batch.stop - heads.batch.start) * (heads.keys.stop - heads.keys.start)
    return x.new_zeros(entries, *x.shape[2:], dtype=tiles.dtype)


def store_of_keys(whole: Tensor, part: Tensor, heads: Heads) -> None:
    """Put the keys of some heads [N, Sk, C] into [B, Hkv, Sk, C], or [N, Sk, 1] into [B, Hkv, Sk]."""
    target = whole[heads.batch, heads.keys]
    target.copy_(part.view(target.shape))
