"""Statistics of every row's softmax and of its gradient, in one pass over blocks of keys.

With the logits z_j = f_j x_j of a row, x_j = q . k_j, f_j of row, key and distance, over its n visible keys, and
p = softmax(z):

    J = diag(p) - p p^T                           the softmax's Jacobian, dp / dz
    ||J||_F^2 = S2 - 2 S3 + S2^2                  S_k = sum p_j^k
    dp / dx = J diag(f)                           the factor of a gradient of p on its way to q . k

Both norms vanish if p is one-hot. If p is uniform, ||J||_F is about 1 / sqrt(n), and dp / dx vanishes with f.
A sum of powers of p would cancel if p is nearly one-hot. So the row's largest logit is left out of every sum: with
w_j = exp(z_j - z_top), r = sum w, a = sum w^2, and A = sum f^2 w^2, B = sum f^2 w^3 over the other keys,

    (1 + r)^4 ||J diag(f)||_F^2 = (f_top^2 + A) (r^2 + a) + 2 (A - B) (1 + r)

and every term is at least 0.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.cpu.tiles import Block, Tiles
from ..calls.dispatch import logits
from ..core.call import AttentionCall, Request
from ..core.statistics import Statistics

_NOTHING = -1000.0  # a difference of logits whose exp is 0; -inf would make 0 * -inf


@dataclass(frozen=True, eq=False)
class RowStatistics:
    """Statistics of every row, fp64 [B, Hq, Sq]; all are 0 for a row without keys.

    key_count         n, the visible keys
    factor            the row's factor of q . k, without factors of single keys (cosine's) and of distances
    logit_std         standard deviation of the logits over the n keys (divided by n, not n - 1)
    max_logit         the largest logit
    max_probability   max p
    entropy           -sum p ln p, in nats
    output_variance   variance of p over the n keys: (S2 - 1 / n) / n
    jacobian_norm     ||J||_F
    gradient_norm     ||J diag(f)||_F: jacobian_norm * |factor|, unless a mode has factors of keys or distances too
    """

    key_count: Tensor
    factor: Tensor
    logit_std: Tensor
    max_logit: Tensor
    max_probability: Tensor
    entropy: Tensor
    output_variance: Tensor
    jacobian_norm: Tensor
    gradient_norm: Tensor

    @property
    def relative_entropy(self) -> Tensor:
        """The relative entropy, by the function of that name."""
        return relative_entropy(self.entropy, self.key_count)


def relative_entropy(entropy: Tensor, count: Tensor) -> Tensor:
    """Compute entropy / ln(n) of rows of n visible keys, fp64: 1 is uniform, 0 a single key; NaN where n < 2."""
    several = count > 1
    return torch.where(several, entropy.double() / torch.where(several, count, 2).log(), torch.nan)


@torch.no_grad()
def row_statistics(request: Request) -> RowStatistics:
    """The statistics of the q and k of a checked request, computed in fp64; memory O(S D), no [Sq, Sk] tensor."""
    q, k, visibility = request.q, request.k, request.visibility
    with torch.autocast(q.device.type, enabled=False):
        terms = logits(request, Statistics(k, visibility))
        tiles = Tiles(AttentionCall(q, k, k, visibility, terms), torch.float64)
        names = [field.name for field in fields(RowStatistics)]
        found = {name: q.new_zeros(visibility.rows, dtype=torch.float64) for name in names}
        if q.numel() and k.numel():
            for heads in tiles.heads():
                for block in tiles.blocks(heads):
                    for name, part in _of_block(tiles, block).items():
                        rows = found[name][block.index]
                        rows.copy_(part.view(rows.shape))
    return RowStatistics(**found)


class _Part(NamedTuple):
    """A softmax over some keys, [N, G * rows, 1] each. "Other" keys are all but the top, which has the largest logit.

    top          its logit; -inf over no keys
    top_square   f^2 of its key
    rest         r, sum of w over the other keys
    spread       sum of w ln w
    squares      a, sum of w^2
    cubes        sum of w^3
    f_squares    A, sum of f^2 w^2
    f_cubes      B, sum of f^2 w^3
    count        keys, the top among them
    mean         of the logits
    deviations   sum of (logit - mean)^2

    f is here the factor of a key; the row's is applied at the end.
    """

    top: Tensor
    top_square: Tensor
    rest: Tensor
    spread: Tensor
    squares: Tensor
    cubes: Tensor
    f_squares: Tensor
    f_cubes: Tensor
    count: Tensor
    mean: Tensor
    deviations: Tensor


def _of_block(tiles: Tiles, block: Block) -> dict[str, Tensor]:
    """The fields of RowStatistics for a block's rows, [N, G * rows, 1] each; none if no key is visible."""
    query = tiles.of_rows(tiles.call.q, block)
    factor = torch.full_like(query[..., :1], tiles.call.terms.scale)
    if tiles.call.terms.query_scale is not None:
        factor = factor * tiles.of_each_row(tiles.call.terms.query_scale, block)
    query = query * factor
    softmax = None
    for keys, hidden in tiles.keys_of(block, tiles.spans_of(block)):
        part = _part(tiles, block, query, keys, hidden)
        softmax = part if softmax is None else _joined(softmax, part)
    return {} if softmax is None else _finished(softmax, factor)


def _part(tiles: Tiles, block: Block, query: Tensor, keys: slice, hidden: Tensor | None) -> _Part:
    """The softmax of query [N, G * rows, D] over a span of keys."""
    known = torch.bmm(query, tiles.scaled_keys(block.heads, keys).mT)  # [N, G * rows, keys]
    of_distance = tiles.of_distance(block, keys, hidden, tiles.call.terms.relative_scale)
    tiles.scale_pairs(known, of_distance, block)
    tiles.add_bias(known, block, keys)
    tiles.hide(known, block, hidden, 0.0)
    logit, count = known, torch.full_like(known[..., :1], keys.stop - keys.start)
    if hidden is not None:
        seen = torch.ones_like(known)
        tiles.hide(seen, block, hidden, 0.0)
        count = seen.sum(-1, keepdim=True)
        logit = known.clone()
        tiles.hide(logit, block, hidden)
    mean = known.sum(-1, keepdim=True) / count.clamp(min=1)
    deviation = known - mean
    tiles.hide(deviation, block, hidden, 0.0)

    top, index = logit.max(-1, keepdim=True)
    shift = (logit - top.masked_fill(top == -torch.inf, 0)).scatter_(-1, index, -torch.inf)
    w = shift.exp()
    square = w.square()
    cube = square * w
    squares, cubes = square.sum(-1, keepdim=True), cube.sum(-1, keepdim=True)
    top_square, f_squares, f_cubes = torch.ones_like(top), squares, cubes
    if of_distance is not None:
        f = torch.ones_like(w)
        tiles.scale_pairs(f, of_distance.square(), block)
        top_square, square, cube = f.gather(-1, index), square * f, cube * f
        f_squares, f_cubes = square.sum(-1, keepdim=True), cube.sum(-1, keepdim=True)
    if tiles.call.terms.key_scale is not None:
        f = tiles.of_keys(tiles.call.terms.key_scale[..., None], block.heads, keys).square()  # [N, keys, 1]
        top_square = top_square * f.mT.expand_as(w).gather(-1, index)
        f_squares, f_cubes = torch.bmm(square, f), torch.bmm(cube, f)
    spread = (w * shift.clamp(min=_NOTHING)).sum(-1, keepdim=True)
    return _Part(
        top,
        top_square,
        w.sum(-1, keepdim=True),
        spread,
        squares,
        cubes,
        f_squares,
        f_cubes,
        count,
        mean,
        deviation.square().sum(-1, keepdim=True),
    )


def _joined(one: _Part, two: _Part) -> _Part:
    """The softmax over the keys of both: the lower top becomes one of the other keys."""
    swap = (two.top > one.top) | two.top.isnan()
    high = _Part(*(torch.where(swap, b, a) for a, b in zip(one, two, strict=True)))
    low = _Part(*(torch.where(swap, a, b) for a, b in zip(one, two, strict=True)))
    shift = torch.where(low.top == -torch.inf, -torch.inf, low.top - high.top)
    w = shift.exp()
    count = one.count + two.count
    share = two.count / count.clamp(min=1)
    apart = two.mean - one.mean
    return _Part(
        top=high.top,
        top_square=high.top_square,
        rest=high.rest + w * (1 + low.rest),
        spread=high.spread + w * (low.spread + shift.clamp(min=_NOTHING) * (1 + low.rest)),
        squares=high.squares + w**2 * (1 + low.squares),
        cubes=high.cubes + w**3 * (1 + low.cubes),
        f_squares=high.f_squares + w**2 * (low.top_square + low.f_squares),
        f_cubes=high.f_cubes + w**3 * (low.top_square + low.f_cubes),
        count=count,
        mean=one.mean + apart * share,
        deviations=one.deviations + two.deviations + apart.square() * one.count * share,
    )


def _finished(x: _Part, factor: Tensor) -> dict[str, Tensor]:
    """The fields of RowStatistics; factor is the row's."""
    n, total = x.count.clamp(min=1), 1 + x.rest

    def norm(top_square: Tensor | float, f_squares: Tensor, f_cubes: Tensor) -> Tensor:
        mixed = (top_square + f_squares) * (x.rest.square() + x.squares)
        return (mixed + 2 * (f_squares - f_cubes).clamp(min=0) * total).sqrt() / total.square()

    values = {
        "key_count": x.count,
        "factor": factor,
        "logit_std": (x.deviations / n).sqrt(),
        "max_logit": x.top,
        "max_probability": 1 / total,
        "entropy": x.rest.log1p() - x.spread / total,
        "output_variance": ((1 + x.squares) / total.square() - 1 / n).clamp(min=0) / n,
        "jacobian_norm": norm(1.0, x.squares, x.cubes),
        "gradient_norm": norm(x.top_square, x.f_squares, x.f_cubes) * factor.abs(),
    }
    return {name: torch.where(x.count > 0, value, 0) for name, value in values.items()}
