"""The tangents of out and lse along tangents of a call's tensors; rows and pairs that the second pass needs too.

With x = q' . k' + biases, q' = scale * query_scale * q and k' = key_scale * k, and a dot for a tangent:

    x_dot_ij  = q'_dot_i . k'_j + q'_i . k'_dot_j + biases_dot_ij
                with a relative scale f of pairs: f (q' . k')_dot + f_dot (q' . k') + biases_dot
    z_dot_ij  = x_dot_ij (1 - (z_ij / softcap)^2)         x_dot_ij without softcap; biases after it join here
    mean_i    = sum_j s_ij z_dot_ij                       the tangent of lse
    r_i       = share_i mean_i + (1 - share_i) sinks_dot_i
    out_dot_i = share_i sum_j keep_ij s_ij ((z_dot_ij - r_i) v_j + v_dot_j)

Products with a tangent that is not there are left out. s, share and keep are those of `backends.cpu`. Sums over keys
are kept as means over the keys so far, and differences are taken from such a mean: what cancels in a row whose softmax
is nearly 1 at one key cancels before it is multiplied and rounded, and in a row of one key to 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...core.call import AttentionCall
from ...core.terms import Gradients, addends
from .fixed_tiles import tiles_of
from .tiles import Block, Heads, Tiles
from .weights import rows_with_keys, shares, weights


def tangent(call: AttentionCall, lse: Tensor, tangents: Gradients) -> tuple[Tensor, Tensor]:
    """Compute the tangents of out and lse from those of the call's tensors, of which None stands for zero.

    lse [B, Hq, Sq] is that of `forward`.
    """
    tiles = tiles_of(call)
    out_tangent = call.v.new_empty(*call.q.shape[:3], call.v.shape[3])
    lse_tangent = torch.empty_like(lse)
    for heads in tiles.heads():
        for block in tiles.blocks(heads):
            rows = Rows.of(tiles, block, lse, tangents)
            means = _Means(rows, tangents)
            for pairs in pairs_of(rows, tangents):
                means.add(pairs)
            tiles.store(out_tangent, means.out_tangent(), block)
            tiles.store(lse_tangent, means.rate, block)
    return out_tangent, lse_tangent


class Total:
    """The sum of a block's weights over the keys so far, [N, G * rows, 1]."""

    def __init__(self, tiles: Tiles, like: Tensor) -> None:
        self.tiles, self.total = tiles, torch.zeros_like(like)

    def add(self, weight: Tensor) -> Tensor:
        """Add a span's weights and divide them by the sum; return the older part's share of it.

        A mean over the keys so far is share * older mean + sum of weight * x.
        """
        older, self.total = self.total, self.total + self.tiles.sum(weight)
        divisor = self.divisor
        weight.div_(divisor)
        return older / divisor

    @property
    def divisor(self) -> Tensor:
        """The sum, and 1 in rows without keys."""
        return self.total.masked_fill(self.total == 0, 1)


class _Means:
    """Means over the keys so far, weighed by their softmax, of a block of rows.

    rate       of z_dot, [N, G * rows, 1]
    value      of keep * v, [N, G * rows, Dv]
    tangent    of keep * ((z_dot - rate) * v + v_dot), likewise
    """

    def __init__(self, rows: Rows, tangents: Gradients) -> None:
        self.rows, self.tiles, self.tangents = rows, rows.tiles, tangents
        self.total, self.rate = Total(self.tiles, rows.lse), torch.zeros_like(rows.lse)
        self.value = rows.lse.new_zeros(*rows.lse.shape[:2], self.tiles.call.v.shape[3])
        self.tangent = torch.zeros_like(self.value)

    def add(self, pairs: Pairs) -> None:
        """Add a span of keys."""
        tiles, block, keys, weight = self.tiles, self.rows.block, pairs.keys, pairs.weight
        decay, older, change = self.total.add(weight), self.rate, pairs.rate
        self.tangent.mul_(decay)
        if change is not None:
            self.rate = older * decay + tiles.dot(weight, change)
            change = change.sub_(self.rate)
        if (kept := tiles.kept(block, keys)) is not None:
            weight.mul_(kept)
        if change is not None or self.rows.sink_tangent is not None:
            value = tiles.of_keys(tiles.call.v, block.heads, keys)
            self.value.mul_(decay)
            if change is not None:
                self.tangent.addcmul_(self.value, older - self.rate)
                self.tangent.baddbmm_(change.mul_(weight), value)
            self.value.baddbmm_(weight, value)
        if self.tangents.v is not None:
            self.tangent.baddbmm_(weight, tiles.of_keys(self.tangents.v, block.heads, keys))

    def out_tangent(self) -> Tensor:
        found, shift = self.tangent, self.rows.shift(self.rate)
        return self.rows.weighed_by_share(found if shift is None else found - shift * self.value)


@dataclass(frozen=True)
class Scaled:
    """x, [N, rows or keys, C], times number * scale; None stands for a scale of 1 and for a tangent of 0."""

    x: Tensor
    number: float
    scale: Tensor | None
    x_tangent: Tensor | None
    scale_tangent: Tensor | None

    @classmethod
    def keys_of(cls, tiles: Tiles, tangents: Gradients, heads: Heads, keys: slice | None = None) -> Scaled:
        """Some or all keys of some heads, times key_scale."""

        def of(x: Tensor | None) -> Tensor | None:
            return None if x is None else tiles.of_keys(x if x.dim() == 4 else x[..., None], heads, keys)

        key = tiles.of_keys(tiles.call.k, heads, keys)
        return cls(key, 1.0, of(tiles.call.terms.key_scale), of(tangents.k), of(tangents.key_scale))

    @property
    def factor(self) -> Tensor | float:
        return self.number if self.scale is None else self.scale * self.number

    @cached_property
    def value(self) -> Tensor:
        return _times(self.x, self.factor)

    @cached_property
    def tangent(self) -> Tensor | None:
        """The tangent of the product, or None for 0."""
        found = None if self.x_tangent is None else _times(self.x_tangent, self.factor)
        if self.scale_tangent is None:
            return found
        by_scale = self.x * (self.scale_tangent * self.number)
        return by_scale if found is None else by_scale.add_(found)

    def gradient(self, d_value: Tensor, d_tangent: Tensor | None) -> Tensor:
        """The gradient of x, from those of the product and of its tangent."""
        found = _times(d_value, self.factor)
        if d_tangent is None or self.scale_tangent is None:
            return found
        return found + d_tangent * (self.scale_tangent * self.number)

    def gradient_of_scale(self, tiles: Tiles, d_value: Tensor, d_tangent: Tensor | None) -> Tensor:
        """The gradient of the scale, likewise: [N, rows or keys, 1]."""
        found = tiles.dot(self.x, d_value)
        if d_tangent is not None and self.x_tangent is not None:
            found = found + tiles.dot(self.x_tangent, d_tangent)
        return found * self.number


def _times(x: Tensor, factor: Tensor | float) -> Tensor:
    return x if isinstance(factor, float) and factor == 1 else x * factor


@dataclass(frozen=True)
class Rows:
    """The rows of a block: [N, G * rows, ...]; zeros, and lse inf, for rows without keys.

    seeing         the block of a tensor [B, Hq, Sq, C], with these zeros
    query          q, its scales and their tangents
    lse            without the sink
    shares         of the softmax, to the keys and to the sink, or None without sinks
    sink_tangent   or None for 0
    """

    tiles: Tiles
    block: Block
    seeing: Callable[[Tensor], Tensor]
    query: Scaled
    lse: Tensor
    shares: tuple[Tensor, Tensor] | None
    sink_tangent: Tensor | None

    @classmethod
    def of(cls, tiles: Tiles, block: Block, lse: Tensor, tangents: Gradients) -> Rows:
        call = tiles.call
        lse, blind, seeing = rows_with_keys(tiles, block, lse)

        def of(x: Tensor | None) -> Tensor | None:
            return None if x is None else seeing(x if x.dim() == 4 else x[..., None])

        scales = of(call.terms.query_scale), of(tangents.q), of(tangents.query_scale)
        query = Scaled(seeing(call.q), call.terms.scale, *scales)
        share, sink_tangent = shares(tiles, block, lse, blind), of(tangents.sinks)
        return cls(tiles, block, seeing, query, lse.masked_fill(blind, torch.inf), share, sink_tangent)

    def weighed_by_share(self, x: Tensor) -> Tensor:
        """x * share / (1 - p)."""
        x = x if self.shares is None else x * self.shares[0]
        dropout = self.tiles.call.dropout
        return x if dropout is None else x / (1 - dropout.p)

    def shift(self, mean: Tensor) -> Tensor | None:
        """r - mean, or None for 0."""
        if self.shares is None:
            return None
        _, taken = self.shares
        return taken * (-mean if self.sink_tangent is None else self.sink_tangent - mean)


@dataclass(frozen=True)
class Pairs:
    """Pairs of a block and a span of keys: [N, G * rows, keys]; key is [N, keys, D].

    weight    exp(z - lse)
    factors   the relative scale and its tangent, `Tiles.of_distance`, each or None
    capped    tanh(x / softcap), or None without softcap
    slope     1 - capped^2, or None
    inner     the tangent of x, or None for 0
    rate      the tangent of z, or None for 0; where slope is None it may be inner
    """

    keys: slice
    key: Scaled
    factors: tuple[Tensor | None, Tensor | None]
    weight: Tensor
    capped: Tensor | None
    slope: Tensor | None
    inner: Tensor | None
    rate: Tensor | None


def pairs_of(rows: Rows, tangents: Gradients, needs_rate: bool = True) -> Iterator[Pairs]:
    """The pairs of a block, span after span; without their tangents unless `needs_rate`."""
    tiles, block = rows.tiles, rows.block
    is_after, tables = tiles.call.terms.bias_after_softcap, (tiles.call.terms.relative_scale, tangents.relative_scale)
    for keys, hidden in tiles.keys_of(block, tiles.spans_of(block)):
        key = Scaled.keys_of(tiles, tangents, block.heads, keys)
        of_rows = rows.query.x, rows.query.factor, rows.lse
        scale, scale_tangent = tables
        factors = (
            tiles.of_distance(block, keys, hidden, scale),
            tiles.of_distance(block, keys, hidden, scale_tangent, fill=0.0),
        )
        weight, capped = weights(tiles, block, of_rows, keys, key.value, hidden, factors[0])
        slope, inner = None if capped is None else 1 - capped.square(), None
        if needs_rate:
            inner = tangent_of_products(rows, key)
            if inner is not None:
                tiles.scale_pairs(inner, factors[0], block)
            if factors[1] is not None:
                by_table = torch.bmm(rows.query.value, key.value.mT)
                tiles.scale_pairs(by_table, factors[1], block)
                inner = by_table if inner is None else inner.add_(by_table)
            inner = inner if is_after else _with_biases(rows, keys, inner, weight, hidden, tangents)
        rate = inner if slope is None or inner is None else inner * slope
        if needs_rate and is_after:
            rate = _with_biases(rows, keys, rate, weight, hidden, tangents)
        yield Pairs(keys, key, factors, weight, capped, slope, inner, rate)


def _with_biases(
    rows: Rows, keys: slice, x: Tensor | None, like: Tensor, hidden: Tensor | None, tangents: Gradients
) -> Tensor | None:
    """x with the tangents of biases added to it in place, 0 where hidden; None stands for 0."""
    if addends(tangents):
        x = torch.zeros_like(like) if x is None else x
        rows.tiles.add_bias(x, rows.block, keys, tangents)
        rows.tiles.hide(x, rows.block, hidden, 0.0)
    return x


def tangent_of_products(rows: Rows, key: Scaled) -> Tensor | None:
    """The tangent of q' . k', [N, G * rows, keys], or None for 0."""
    total = None
    for x, y in (rows.query.tangent, key.value), (rows.query.value, key.tangent):
        if x is not None and y is not None:
            total = torch.bmm(x, y.mT) if total is None else total.baddbmm_(x, y.mT)
    return total
