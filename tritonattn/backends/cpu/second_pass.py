"""Gradients of a tangent towards the call's tensors and towards their tangents.

With the gradients T of out_dot and rho of lse_dot, and the names of `tangent_pass`:

    u_ij     = share_i keep_ij (T_i . v_j),  w_ij = share_i keep_ij (T_i . v_dot_j)
    delta_i  = sum_j s_ij u_ij                                          T_i . out_i
    eta_i    = sum_j s_ij ((z_dot_ij - r_i) u_ij + w_ij)                T_i . out_dot_i
    y_ij     = u_ij - share_i delta_i + rho_i
    dz_dot_ij = s_ij y_ij
    dz_ij    = s_ij ((z_dot_ij - r_i) y_ij + w_ij - share_i eta_i + rho_i (r_i - mean_i))
    dx_dot_ij = dz_dot_ij slope_ij,  slope_ij = 1 - (z_ij / softcap)^2
    dx_ij    = slope_ij (dz_ij - 2 (z_ij / softcap^2) x_dot_ij dz_dot_ij)
    dq'_i    = sum_j dx_ij k'_j + dx_dot_ij k'_dot_j,  dq'_dot_i = sum_j dx_dot_ij k'_j;  keys likewise
    dv_j     = sum_i share_i keep_ij s_ij (z_dot_ij - r_i) T_i,  dv_dot_j = sum_i share_i keep_ij s_ij T_i
    dsinks_i = (1 - share_i) (-(sinks_dot_i - r_i) delta_i - eta_i),  dsinks_dot_i = -(1 - share_i) delta_i

The gradient of a bias is dx, of its tangent dx_dot: dz and dz_dot where biases are added after the softcap. With a
relative scale f and z = f p + biases, p = q' . k', the gradient of f is dx p + dx_dot p_dot, of its tangent dx_dot p;
above, dx_dot f stands for dx_dot, and dx f + dx_dot f_dot for dx. A first
sweep over the keys of a block of rows has the sums, a second the gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...core.call import AttentionCall
from ...core.terms import Gradients
from ..protocol import SecondOrder
from .fixed_tiles import tiles_of
from .sums import add_biases, allocated, rounded, store_of_keys, sums_over_rows
from .tangent_pass import Pairs, Rows, Scaled, Total, pairs_of, tangent_of_products
from .tiles import Heads, Tiles


def second(call: AttentionCall, lse: Tensor, asked: SecondOrder) -> tuple[Gradients, Gradients]:
    """Compute the gradients of `tangent` towards the call's tensors, and towards their tangents.

    lse [B, Hq, Sq] is that of `forward`.
    """
    tangents, d_out, d_lse, needs, needs_tangents, _ = asked
    tiles = tiles_of(call)
    found = allocated(tiles, needs), allocated(tiles, needs_tangents)
    wants = _Wants.of(tangents, *found)
    for heads in tiles.heads():
        of_keys = _KeySums.of(tiles, heads, wants)
        for block in tiles.blocks(heads):
            rows = _SecondRows.of(Rows.of(tiles, block, lse, tangents), tangents, wants, d_out, d_lse)
            of_query = _add_tiles(rows, of_keys, found)
            _store(tiles, rows.rows.query, of_query, ("q", "query_scale"), found, partial(tiles.store, block=block))
        for gradients, sums in zip(found, (of_keys.value, of_keys.value_tangent), strict=True):
            if gradients.v is not None and sums is not None:
                store_of_keys(gradients.v, sums, heads)
        key, of_key = Scaled.keys_of(tiles, tangents, heads), (of_keys.key, of_keys.key_tangent)
        _store(tiles, key, of_key, ("k", "key_scale"), found, partial(store_of_keys, heads=heads))
    return rounded(tiles, found[0]), rounded(tiles, found[1])


@dataclass(frozen=True)
class _Wants:
    """The sums that are computed for the gradients asked for: of the names in `second_pass`, d of each is one."""

    dz: bool
    dz_dot: bool
    rate: bool
    query: bool
    query_tangent: bool
    key: bool
    key_tangent: bool
    value: bool
    value_tangent: bool

    @classmethod
    def of(cls, tangents: Gradients, gradients: Gradients, of_tangents: Gradients) -> _Wants:
        def has(record: Gradients, *names: str) -> bool:
            return any(getattr(record, name) is not None for name in names)

        def crosses(x: str, scale: str) -> bool:
            """True where the gradient of one factor needs that of the product's tangent, by the other's tangent."""
            return any(has(gradients, one) and has(tangents, other) for one, other in ((x, scale), (scale, x)))

        of_logits = tuple(name for name in Gradients._fields if name != "v")
        dz, value = has(gradients, *of_logits), has(gradients, "v")
        return cls(
            dz=dz,
            dz_dot=dz or has(of_tangents, *of_logits),
            rate=dz or value,
            query=has(gradients, "q", "query_scale"),
            query_tangent=has(of_tangents, "q", "query_scale") or crosses("q", "query_scale"),
            key=has(gradients, "k", "key_scale"),
            key_tangent=has(of_tangents, "k", "key_scale") or crosses("k", "key_scale"),
            value=value,
            value_tangent=has(of_tangents, "v"),
        )


@dataclass(frozen=True)
class _KeySums:
    """Sums over rows, [N, Sk, ...], of the gradients of k', v and their tangents; None for those not wanted."""

    key: Tensor | None
    key_tangent: Tensor | None
    value: Tensor | None
    value_tangent: Tensor | None

    @classmethod
    def of(cls, tiles: Tiles, heads: Heads, wants: _Wants) -> _KeySums:
        k, v = tiles.call.k, tiles.call.v
        pairs = (wants.key, k), (wants.key_tangent, k), (wants.value, v), (wants.value_tangent, v)
        return cls(*(sums_over_rows(tiles, heads, x) if is_wanted else None for is_wanted, x in pairs))


@dataclass(frozen=True)
class _Piece:
    """Pairs of a span, with u and w [N, G * rows, keys], or None where not wanted or 0; kept as of tiles."""

    pairs: Pairs
    kept: Tensor | None
    u: Tensor | None
    w: Tensor | None


@dataclass(frozen=True)
class _RowSums:
    """Sums over keys, [N, G * rows, 1]: of weights, which are still to be divided by it; mean, r - mean, delta, eta."""

    total: Tensor
    mean: Tensor
    shift: Tensor | None
    delta: Tensor
    eta: Tensor


@dataclass(frozen=True)
class _SecondRows:
    """The rows of a block with the gradients of their tangents, [N, G * rows, ...].

    d_out    T * share / (1 - p)
    d_lse    rho, or None
    """

    rows: Rows
    tangents: Gradients
    wants: _Wants
    d_out: Tensor
    d_lse: Tensor | None

    @classmethod
    def of(cls, rows: Rows, tangents: Gradients, wants: _Wants, d_out: Tensor, d_lse: Tensor | None) -> _SecondRows:
        d_out = rows.weighed_by_share(rows.seeing(d_out))
        d_lse = None if d_lse is None else rows.seeing(d_lse[..., None])
        return cls(rows, tangents, wants, d_out, d_lse)

    def pieces(self) -> Iterator[_Piece]:
        tiles, block, wants = self.rows.tiles, self.rows.block, self.wants
        values = (tiles.call.v if wants.dz_dot else None), (self.tangents.v if wants.dz else None)
        for pairs in pairs_of(self.rows, self.tangents, wants.rate):
            kept, products = tiles.kept(block, pairs.keys), []
            for v in values:
                product = None
                if v is not None:
                    product = torch.bmm(self.d_out, tiles.of_keys(v, block.heads, pairs.keys).mT)
                    product = product if kept is None else product.mul_(kept)
                products.append(product)
            yield _Piece(pairs, kept, *products)

    def sums(self, pieces: Iterable[_Piece]) -> _RowSums:
        """Means over the keys. eta grows as a covariance does, about the means so far; a lone piece's weights are
        divided by their sum.
        """
        tiles, total = self.rows.tiles, Total(self.rows.tiles, self.rows.lse)
        mean, delta, eta = (torch.zeros_like(self.rows.lse) for _ in range(3))
        for piece in pieces:
            weight, rate, u, w = piece.pairs.weight, piece.pairs.rate, piece.u, piece.w
            decay, older = total.add(weight), (mean, delta)
            if rate is not None:
                mean = mean * decay + tiles.dot(weight, rate)
            if u is not None:
                delta = delta * decay + tiles.dot(weight, u)
            if u is not None and rate is not None:
                eta = eta + (older[0] - mean) * (older[1] - delta)
                eta = eta * decay + tiles.dot(weight, (rate - mean).mul_(u - delta))
            else:
                eta = eta * decay
            if w is not None:
                eta += tiles.dot(weight, w)
        shift = self.rows.shift(mean)
        return _RowSums(total.divisor, mean, shift, delta, eta if shift is None else eta - shift * delta)

    def shifts(self, sums: _RowSums) -> tuple[Tensor, Tensor]:
        """rho - share * delta, and rho * (r - mean) - share * eta."""
        share = 1 if self.rows.shares is None else self.rows.shares[0]
        of_y, of_dz = -sums.delta * share, -sums.eta * share
        if self.d_lse is None:
            return of_y, of_dz
        return of_y + self.d_lse, of_dz if sums.shift is None else of_dz + self.d_lse * sums.shift


def _add_tiles(
    rows: _SecondRows, of_keys: _KeySums, found: tuple[Gradients, Gradients]
) -> tuple[Tensor | None, Tensor | None]:
    """Add the block's tiles to the sums over rows; return the gradients of q' and of its tangent."""
    tiles, block, wants, query = rows.rows.tiles, rows.rows.block, rows.wants, rows.rows.query
    kept = list(rows.pieces()) if len(tiles.spans_of(block)) <= 1 else None
    sums = rows.sums(rows.pieces() if kept is None else kept)
    _store_of_sinks(rows, sums, found)
    of_y, of_dz = rows.shifts(sums)
    d_query, d_tangent = (
        torch.zeros_like(query.x) if is_wanted else None for is_wanted in (wants.query, wants.query_tangent)
    )
    for piece in rows.pieces() if kept is None else kept:
        pairs, keys = piece.pairs, piece.pairs.keys
        if kept is None:
            pairs.weight.div_(sums.total)
        center = sums.mean if sums.shift is None else sums.mean + sums.shift
        change = -center if pairs.rate is None else pairs.rate.sub_(center)
        _add_values(rows, piece, change, of_keys)
        if piece.u is None:
            continue
        d_logit, d_rate = _of_logits(rows, piece, change, (of_y, of_dz), found)
        if d_query is not None:
            d_query.baddbmm_(d_logit, pairs.key.value)
            if pairs.key.tangent is not None:
                d_query.baddbmm_(d_rate, pairs.key.tangent)
        if d_tangent is not None:
            d_tangent.baddbmm_(d_rate, pairs.key.value)
        if of_keys.key is not None:
            tiles.add_product(of_keys.key, keys, d_logit.mT, query.value)
            if query.tangent is not None:
                tiles.add_product(of_keys.key, keys, d_rate.mT, query.tangent)
        if of_keys.key_tangent is not None:
            tiles.add_product(of_keys.key_tangent, keys, d_rate.mT, query.value)
    return d_query, d_tangent


def _add_values(rows: _SecondRows, piece: _Piece, change: Tensor, of_keys: _KeySums) -> None:
    """Add a tile to the gradients of v and of its tangent; change is z_dot - r."""
    if of_keys.value is None and of_keys.value_tangent is None:
        return
    tiles, keys, weight = rows.rows.tiles, piece.pairs.keys, piece.pairs.weight
    kept = weight if piece.kept is None else weight * piece.kept
    if of_keys.value is not None:
        tiles.add_product(of_keys.value, keys, (kept * change).mT, rows.d_out)
    if of_keys.value_tangent is not None:
        tiles.add_product(of_keys.value_tangent, keys, kept.mT, rows.d_out)


def _of_logits(
    rows: _SecondRows,
    piece: _Piece,
    change: Tensor,
    shifts: tuple[Tensor, Tensor],
    found: tuple[Gradients, Gradients],
) -> tuple[Tensor, Tensor]:
    """dx and dx_dot of a tile, added to the gradients of biases; dx is dx_dot where it is not wanted."""
    tiles, block, pairs = rows.rows.tiles, rows.rows.block, piece.pairs
    softcap, is_after = tiles.call.terms.softcap, tiles.call.terms.bias_after_softcap
    assert piece.u is not None
    of_y, of_dz = shifts
    d_rate = piece.u.add_(of_y)
    d_logit = None
    if rows.wants.dz:
        d_logit = (change * d_rate).add_(of_dz)
        d_logit = (d_logit if piece.w is None else d_logit.add_(piece.w)).mul_(pairs.weight)
    d_rate.mul_(pairs.weight)
    tile = tuple(zip((d_logit, d_rate), found, strict=True))

    def add_to_biases() -> None:
        for x, gradients in tile:
            if x is not None:
                add_biases(tiles, block, pairs.keys, x, gradients)

    if is_after:
        add_to_biases()
    if softcap is not None and pairs.slope is not None and pairs.capped is not None:
        if d_logit is not None:
            if pairs.inner is not None:
                d_logit.addcmul_(pairs.inner.mul_(pairs.capped), d_rate, value=-2 / softcap)
            d_logit.mul_(pairs.slope)
        d_rate.mul_(pairs.slope)
    if not is_after:
        add_to_biases()
    _scale_by_distance(rows, pairs, d_logit, d_rate, found)
    return d_rate if d_logit is None else d_logit, d_rate


def _scale_by_distance(
    rows: _SecondRows, pairs: Pairs, d_logit: Tensor | None, d_rate: Tensor, found: tuple[Gradients, Gradients]
) -> None:
    """Take dx and dx_dot to the product's gradients, in place; add those of the relative scale to its tables."""
    tiles, block, (factor, factor_tangent) = rows.rows.tiles, rows.rows.block, pairs.factors
    of_table, of_tangent = (gradients.relative_scale for gradients in found)
    if of_table is not None or of_tangent is not None:
        product = torch.bmm(rows.rows.query.value, pairs.key.value.mT)
        if of_tangent is not None:
            tiles.add_to_table(d_rate * product, block, pairs.keys, of_tangent)
        if of_table is not None and d_logit is not None:
            product.mul_(d_logit)
            if (product_tangent := tangent_of_products(rows.rows, pairs.key)) is not None:
                product.addcmul_(product_tangent, d_rate)
            tiles.add_to_table(product, block, pairs.keys, of_table)
    if d_logit is not None:
        tiles.scale_pairs(d_logit, factor, block)
        if factor_tangent is not None:
            by_tangent = d_rate.clone()
            tiles.scale_pairs(by_tangent, factor_tangent, block)
            d_logit.add_(by_tangent)
    tiles.scale_pairs(d_rate, factor, block)


def _store_of_sinks(rows: _SecondRows, sums: _RowSums, found: tuple[Gradients, Gradients]) -> None:
    tiles, block, sink_tangent = rows.rows.tiles, rows.rows.block, rows.rows.sink_tangent
    if rows.rows.shares is None:
        return
    share, taken = rows.rows.shares
    gradients, of_tangents = found
    if of_tangents.sinks is not None:
        tiles.store(of_tangents.sinks, -taken * sums.delta, block)
    if gradients.sinks is not None:
        change = share * (-sums.mean if sink_tangent is None else sink_tangent - sums.mean)  # sinks_dot - r
        tiles.store(gradients.sinks, -taken * (change * sums.delta + sums.eta), block)


def _store(
    tiles: Tiles,
    product: Scaled,
    sums: tuple[Tensor | None, Tensor | None],
    names: tuple[str, str],
    found: tuple[Gradients, Gradients],
    store: Callable[[Tensor, Tensor], None],
) -> None:
    """Store the gradients of the factors of a product and of their tangents, from those of it and of its tangent."""
    of_product, of_tangent = sums
    for gradients, d, d_tangent in (found[0], of_product, of_tangent), (found[1], of_tangent, None):
        x, scale = (getattr(gradients, name) for name in names)
        if x is not None and d is not None:
            store(x, product.gradient(d, d_tangent))
        if scale is not None and d is not None:
            store(scale, product.gradient_of_scale(tiles, d, d_tangent))
