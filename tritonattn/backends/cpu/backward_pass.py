"""Gradients, from logits and masks that are computed again tile by tile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.call import AttentionCall, RowGradients
from ...core.rounding import before_rounding
from ...core.terms import Gradients, Needs, addends
from .fixed_tiles import tiles_of
from .sums import add_biases, allocated, rounded, store_of_keys, sums_over_rows
from .tiles import Block, Heads, Tiles, logits_of
from .weights import rows_of_one_key, rows_with_keys, shares, weights


def backward(
    call: AttentionCall,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_rows: RowGradients,
    needs: Needs,
    rounding: Tensor | None = None,
) -> Gradients:
    """Compute the gradients that `needs` asks for.

    out [B, Hq, Sq, Dv], lse [B, Hq, Sq] and rounding are those of `forward`; d_out is shaped like out, any strides.
    """
    tiles = tiles_of(call)
    gradients = allocated(tiles, needs)
    lone = rows_of_one_key(tiles)
    for heads in tiles.heads():
        sums = _KeySums.of(tiles, heads, gradients)
        for block in tiles.blocks(heads):
            rows = _Rows.of(tiles, block, (out, rounding, lse, d_out), d_rows, lone)
            d_query = _add_tiles(tiles, block, rows, sums, gradients)
            _store_of_rows(tiles, block, rows, d_query, gradients)
        _store_of_keys(tiles, heads, sums, gradients)
    return rounded(tiles, gradients)


@dataclass(frozen=True)
class _Rows:
    """The rows of a block, shared by its tiles: [N, G * rows, ...]; zeros, and lse inf, for rows without keys.

    query         q
    query_scale   query_scale, or None
    factor        query_scale * scale
    scaled        q * factor
    lse           without the sink
    d_out         d_out * share / (1 - p)
    d_weight_of   d_out, whose products with values are the gradients of weights. It and delta are 0 for rows of one
                  key: the gradient of that logit is then d_lse, without rounding
    delta         out . d_out
    share         of the softmax that the sink leaves to the keys, or None without sinks
    d_lse         d_lse - d_entropy * entropy, or None
    d_entropy     d_entropy, or None
    d_sink        -(1 - share) * delta, or None without sinks
    """

    query: Tensor
    query_scale: Tensor | None
    factor: Tensor | float
    scaled: Tensor
    lse: Tensor
    d_out: Tensor
    d_weight_of: Tensor
    delta: Tensor
    share: Tensor | None
    d_lse: Tensor | None
    d_entropy: Tensor | None
    d_sink: Tensor | None

    @classmethod
    def of(
        cls,
        tiles: Tiles,
        block: Block,
        saved: tuple[Tensor, Tensor | None, Tensor, Tensor],
        d_rows: RowGradients,
        lone: Tensor | None,
    ) -> _Rows:
        """The terms of rows, from (out, rounding, lse, d_out), the gradients of rows and the rows of one key."""
        call = tiles.call
        out, rounding, lse, d_out = saved
        lse, blind, seeing = rows_with_keys(tiles, block, lse)
        query, d_out = seeing(call.q), seeing(d_out)
        query_scale = None if call.terms.query_scale is None else seeing(call.terms.query_scale[..., None])
        factor = call.terms.scale if query_scale is None else query_scale * call.terms.scale
        rounded, out = out, seeing(out)
        if rounding is not None:
            out = before_rounding(out.to(rounded.dtype), seeing(rounding))
        delta = tiles.dot(out, d_out)
        share = d_sink = None
        if (found := shares(tiles, block, lse, blind)) is not None:
            share, taken = found
            d_sink = -taken * delta
            d_out = d_out * share
        if call.dropout is not None:
            d_out = d_out / (1 - call.dropout.p)
        d_lse, d_entropy, entropies = (
            None if x is None else seeing(x[..., None]) for x in (d_rows.lse, d_rows.entropy, d_rows.entropies)
        )
        if d_entropy is not None and entropies is not None:
            d_lse = -d_entropy * entropies if d_lse is None else d_lse - d_entropy * entropies
        d_weight_of = d_out
        if lone is not None:
            is_lone = tiles.of_each_row(lone, block) > 0
            d_weight_of, delta = d_out.masked_fill(is_lone, 0), delta.masked_fill(is_lone, 0)
        lse = lse.masked_fill(blind, torch.inf)
        of_rows = query, query_scale, factor, query * factor, lse, d_out, d_weight_of, delta, share
        return cls(*of_rows, d_lse, d_entropy, d_sink)

    def shift(self, delta: Tensor) -> Tensor:
        """d_lse - share * delta: added to the gradient of a weight it gives that of a logit, but for the weight."""
        if self.share is not None:
            delta = delta * self.share
        return -delta if self.d_lse is None else self.d_lse - delta


@dataclass(frozen=True)
class _KeySums:
    """Sums over rows, [N, Sk, ...], of dx * q * query_scale * scale and of keep * s * share * d_out."""

    key: Tensor | None
    value: Tensor | None

    @classmethod
    def of(cls, tiles: Tiles, heads: Heads, gradients: Gradients) -> _KeySums:
        needs_key = gradients.k is not None or gradients.key_scale is not None
        key = sums_over_rows(tiles, heads, tiles.call.k) if needs_key else None
        value = None if gradients.v is None else sums_over_rows(tiles, heads, tiles.call.v)
        return cls(key, value)


@dataclass
class _Piece:
    """Pairs of a block and a span of keys: [N, G * rows, keys], or [N, keys, D] for key; slope None for 1.

    of_distance   of `Tiles.of_distance`
    kept          1 for pairs that dropout keeps, 0 for others, or None
    d_logit       after dropout and without delta, or None where nothing but v needs it
    """

    keys: slice
    key: Tensor
    of_distance: Tensor | None
    weight: Tensor
    slope: Tensor | None
    kept: Tensor | None
    d_logit: Tensor | None


def _pieces(tiles: Tiles, block: Block, rows: _Rows, spans: list, needs_logits: bool) -> Iterator[_Piece]:
    for keys, hidden in tiles.keys_of(block, spans):
        key = tiles.scaled_keys(block.heads, keys)
        of_distance = tiles.of_distance(block, keys, hidden, tiles.call.terms.relative_scale)
        weight, capped = weights(tiles, block, (rows.query, rows.factor, rows.lse), keys, key, hidden, of_distance)
        slope = None if capped is None else 1 - capped.square()
        kept, d_logit = tiles.kept(block, keys), None
        if needs_logits:
            value = tiles.of_keys(tiles.call.v, block.heads, keys)
            d_logit = torch.bmm(rows.d_weight_of, value.mT)
            if kept is not None:
                d_logit.mul_(kept)
        yield _Piece(keys, key, of_distance, weight, slope, kept, d_logit)


def _add_tiles(tiles: Tiles, block: Block, rows: _Rows, sums: _KeySums, gradients: Gradients) -> Tensor | None:
    """Add the block's tiles to the sums over rows, and return the sum over keys of dx * k * key_scale.

    Where all the keys are at hand, as those of one tile, weights are divided by their sum and delta is sum_j weight[j]
    * d_weight[j]. The rounding of lse and of out then cancels.
    """
    needs_query = gradients.q is not None or gradients.query_scale is not None
    d_query = torch.zeros_like(rows.query) if needs_query else None
    spans, delta = tiles.spans_of(block), rows.delta
    is_after = tiles.call.terms.bias_after_softcap
    of_pairs = [*addends(gradients), gradients.relative_scale]
    needs_logits = needs_query or sums.key is not None or any(x is not None for x in of_pairs)
    pieces = _pieces(tiles, block, rows, spans, needs_logits)
    if (tiles.joins_spans or len(spans) == 1) and not tiles.call.is_part:
        pieces = list(pieces)
        total, delta = torch.zeros_like(delta), torch.zeros_like(delta)
        for piece in pieces:
            total += tiles.sum(piece.weight)
        total.masked_fill_(total == 0, 1)
        for piece in pieces:
            piece.weight.div_(total)
            if piece.d_logit is not None:
                delta += tiles.dot(piece.weight, piece.d_logit)
    for piece in pieces:
        weight, d_logit = piece.weight, piece.d_logit
        if sums.value is not None:
            kept = weight if piece.kept is None else weight * piece.kept
            tiles.add_product(sums.value, piece.keys, kept.mT, rows.d_out)
        if d_logit is None:
            continue
        d_logit = d_logit.add_(rows.shift(delta)).mul_(weight)
        if rows.d_entropy is not None:
            d_logit.addcmul_(rows.d_entropy, torch.special.entr(weight))
        if is_after:
            add_biases(tiles, block, piece.keys, d_logit, gradients)
        if piece.slope is not None:
            d_logit.mul_(piece.slope)
        if not is_after:
            add_biases(tiles, block, piece.keys, d_logit, gradients)
        if gradients.relative_scale is not None:
            d_pairs = logits_of(rows.query, rows.factor, piece.key).mul_(d_logit)
            tiles.add_to_table(d_pairs, block, piece.keys, gradients.relative_scale)
        tiles.scale_pairs(d_logit, piece.of_distance, block)
        if d_query is not None:
            d_query.baddbmm_(d_logit, piece.key)
        if sums.key is not None:
            tiles.add_product(sums.key, piece.keys, d_logit.mT, rows.scaled)
    return d_query


def _store_of_rows(tiles: Tiles, block: Block, rows: _Rows, d_query: Tensor | None, gradients: Gradients) -> None:
    if gradients.sinks is not None and rows.d_sink is not None:
        tiles.store(gradients.sinks, rows.d_sink, block)
    if d_query is None:
        return
    d_query.mul_(tiles.call.terms.scale)
    if gradients.query_scale is not None:
        tiles.store(gradients.query_scale, tiles.dot(d_query, rows.query), block)
    if gradients.q is not None:
        tiles.store(gradients.q, d_query if rows.query_scale is None else d_query * rows.query_scale, block)


def _store_of_keys(tiles: Tiles, heads: Heads, sums: _KeySums, gradients: Gradients) -> None:
    if gradients.v is not None and sums.value is not None:
        store_of_keys(gradients.v, sums.value, heads)
    if sums.key is None:
        return
    if gradients.key_scale is not None:
        store_of_keys(gradients.key_scale, tiles.dot(sums.key, tiles.of_keys(tiles.call.k, heads)), heads)
    if gradients.k is not None:
        d_key = sums.key
        if tiles.call.terms.key_scale is not None:
            d_key = d_key * tiles.of_keys(tiles.call.terms.key_scale[..., None], heads)
        store_of_keys(gradients.k, d_key, heads)
