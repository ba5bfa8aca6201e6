"""The softmax of a tile's pairs again, from lse; rows without keys and rows of one key, which need care."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .tiles import Block, Tiles, exp_, logits_of


def rows_with_keys(tiles: Tiles, block: Block, lse: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """lse of a block's rows, where they have no key, [N, G * rows, 1], and `tiles.of_rows` with zeros for these."""
    lse = tiles.of_each_row(lse, block)
    blind = lse == -torch.inf
    has_blind = not tiles.readable or bool(blind.any())

    def seeing(x: Tensor) -> Tensor:
        rows = tiles.of_rows(x, block)
        return rows.masked_fill(blind, 0) if has_blind else rows

    return lse, blind, seeing


def shares(tiles: Tiles, block: Block, lse: Tensor, blind: Tensor) -> tuple[Tensor, Tensor] | None:
    """The parts of the softmax that the sink leaves to the keys, and takes: [N, G * rows, 1]; None without sinks."""
    sinks = tiles.call.terms.sinks
    if sinks is None:
        return None
    gap = (lse - tiles.of_each_row(sinks, block)).masked_fill(blind, 0)
    return torch.sigmoid(gap), torch.sigmoid(-gap)


def rows_of_one_key(tiles: Tiles) -> Tensor | None:
    """The rows whose softmax is 1, whatever their one logit: bool [B, Hq, Sq], or None where there is none."""
    call = tiles.call
    if call.is_part or call.terms.sinks is not None:
        return None
    lone = call.visibility.counts() == 1
    return None if tiles.readable and not lone.any() else lone.expand(call.q.shape[:3])


def weights(
    tiles: Tiles,
    block: Block,
    rows: tuple[Tensor, Tensor | float, Tensor],
    keys: slice,
    key: Tensor,
    hidden: Tensor | None,
    of_distance: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """exp(z - lse), 0 where hidden, and tanh(x / softcap), 0 where hidden, or None without softcap.

    rows are (q, factor, lse), of which lse is inf for rows without keys; key is k * key_scale. of_distance multiplies
    their product, `Tiles.of_distance`.
    """
    softcap, capped, is_after = tiles.softcap_of(block), None, tiles.call.terms.bias_after_softcap
    query, factor, lse = rows
    logit = logits_of(query, factor, key)
    tiles.scale_pairs(logit, of_distance, block)
    if not is_after:
        tiles.add_bias(logit, block, keys)
    if softcap is not None:
        tiles.hide(logit, block, hidden, 0.0)  # NaN there has no slope
        capped = logit.div_(softcap).tanh_()
        logit = capped * softcap
    if is_after:
        tiles.add_bias(logit, block, keys)
    tiles.hide(logit, block, hidden)
    return exp_(logit.sub_(lse)), capped
