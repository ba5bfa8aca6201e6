"""Output, lse and statistics of rows, by a softmax that grows with every tile of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.call import AttentionCall, ForwardResult
from ...core.eight_bit import dtype_of_sums
from ...core.rounding import lost_in_rounding
from .fixed_tiles import tiles_of
from .tiles import Block, Tiles, bounded_, logits_of, without_smallest_

# The largest softcap whose eps in fp32 is small beside that of 16 bits.
_LARGEST_CAP = 256.0


def forward(call: AttentionCall, rounding: Tensor | None = None) -> ForwardResult:
    """Compute the output and lse of a call, and where it is asked for the largest logit and the entropy of each row.

    rounding, int8 and shaped like the output, receives what the output lost when it was rounded: `core.rounding`.
    """
    tiles = tiles_of(call)
    rows = call.q.shape[:3]
    out = call.v.new_empty(*rows, call.v.shape[3], dtype=dtype_of_sums(call.q, call.v))
    lse = call.q.new_empty(rows, dtype=tiles.dtype)
    statistics = (torch.empty_like(lse), torch.empty_like(lse)) if call.aux else ()
    for heads in tiles.heads():
        for block in tiles.blocks(heads):
            softmax = _Softmax(_Rows(tiles, block))
            for keys, hidden in tiles.keys_of(block, tiles.spans_of(block)):
                softmax.add(keys, hidden)
            exact = softmax.out()
            rounded = exact.to(out.dtype)
            tiles.store(out, rounded, block)
            if rounding is not None:
                tiles.store(rounding, lost_in_rounding(exact, rounded), block)
            tiles.store(lse, softmax.lse(), block)
            if call.aux:
                for whole, part in zip(statistics, (softmax.largest, softmax.entropy()), strict=True):
                    tiles.store(whole, part, block)
    return ForwardResult(out, lse, *statistics)


def largest_keys(call: AttentionCall) -> Tensor:
    """The lowest key with the largest logit of `_Rows.before_softcap`: int64 [B, Hq, Sq]; -1 in rows without keys."""
    tiles = tiles_of(call)
    found = torch.empty(call.q.shape[:3], dtype=torch.int64, device=call.q.device)
    for heads in tiles.heads():
        for block in tiles.blocks(heads):
            rows = _Rows(tiles, block)
            largest = rows.query.new_full((*rows.query.shape[:2], 1), -torch.inf)
            key = torch.full_like(largest, -1, dtype=torch.int64)
            for keys, hidden in tiles.keys_of(block, tiles.spans_of(block)):
                logit, _ = rows.before_softcap(keys, hidden)
                of_span, at = logit.max(-1, keepdim=True)
                is_larger = of_span > largest
                largest, key = torch.where(is_larger, of_span, largest), torch.where(is_larger, at + keys.start, key)
            tiles.store(found, key, block)
    return found


class _Rows:
    """The rows of a block, for their logits."""

    def __init__(self, tiles: Tiles, block: Block) -> None:
        self.tiles, self.block, self.call = tiles, block, tiles.call
        self.query = tiles.of_rows(self.call.q, block)
        self.factor = self.call.terms.scale
        if self.call.terms.query_scale is not None:
            self.factor = tiles.of_each_row(self.call.terms.query_scale, block) * self.call.terms.scale

    def before_softcap(self, keys: slice, hidden: Tensor | None) -> tuple[Tensor, float | Tensor | None]:
        """The logits of a span of keys before the softcap, [N, G * rows, keys], and the softcap that is still to come.

        With biases after the softcap it has come, and the softcap is None.
        """
        tiles, block, softcap = self.tiles, self.block, self.tiles.softcap_of(self.block)
        logit = logits_of(self.query, self.factor, tiles.scaled_keys(block.heads, keys))
        tiles.scale_pairs(logit, tiles.of_distance(block, keys, None, self.call.terms.relative_scale), block)
        if softcap is not None and self.call.terms.bias_after_softcap:
            logit, softcap = self._capped_(logit, softcap), None
        tiles.add_bias(logit, block, keys)
        tiles.hide(logit, block, hidden)
        return logit, softcap

    def logits(self, keys: slice, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """The logits of a span of keys, [N, G * rows, keys], and the largest of each row of `before_softcap`."""
        logit, softcap = self.before_softcap(keys, hidden)
        largest = logit.amax(-1, keepdim=True)
        if softcap is not None:
            logit = self._capped_(logit, softcap)
            self.tiles.hide(logit, self.block, hidden)
        return logit, largest

    def _capped_(self, logit: Tensor, softcap: float | Tensor) -> Tensor:
        """softcap * tanh(logit / softcap), in place.

        By exp it takes half of tanh's time and errs by the softcap's eps, which only 16-bit results do not show.
        """
        is_rounded = self.call.v.dtype.itemsize == 2 and not self.call.aux
        if not (is_rounded and isinstance(softcap, float) and softcap <= _LARGEST_CAP):
            return logit.div_(softcap).tanh_().mul_(softcap)
        return logit.mul_(2 / softcap).exp_().add_(1).reciprocal_().mul_(-2 * softcap).add_(softcap)


class _Softmax:
    """The softmax of a block's rows over the keys so far, and the values that it weighs.

    peak       largest logit z, after the softcap
    largest    largest logit of `_Rows.logits`
    total      sum of exp(z - peak)
    spread     sum of exp(z - peak) * (z - peak), where statistics are asked for
    weighted   sum of exp(z - peak) * v, over the pairs that dropout keeps

    Each is [N, G * rows, 1] or [N, G * rows, Dv]. entropy = ln(total) - spread / total, of which both are positive.
    """

    def __init__(self, rows: _Rows) -> None:
        self.rows, self.tiles, self.block, self.call = rows, rows.tiles, rows.block, rows.call
        query = rows.query
        self.peak = query.new_full((*query.shape[:2], 1), -torch.inf)
        self.largest, self.total = self.peak, torch.zeros_like(self.peak)
        self.spread = torch.zeros_like(self.peak)
        self.weighted = query.new_zeros(*query.shape[:2], self.call.v.shape[3])

    def add(self, keys: slice, hidden: Tensor | None) -> None:
        """Add a span of keys."""
        logit, largest = self.rows.logits(keys, hidden)
        self.largest = torch.maximum(self.largest, largest)
        if self.call.terms.softcap is not None:
            largest = logit.amax(-1, keepdim=True)
        peak = torch.maximum(self.peak, largest)
        base = peak.masked_fill(peak == -torch.inf, 0)
        above, moved = bounded_(logit.sub_(base)), self.peak - base
        decay = torch.exp(moved)
        if self.call.aux:
            weight = without_smallest_(torch.exp(above))
            moved.clamp_min_(torch.finfo(moved.dtype).min)  # of no key so far, whose total is 0
            self.spread.addcmul_(moved, self.total).mul_(decay).add_(self.tiles.sum(above.mul_(weight)))
        else:
            weight = without_smallest_(above.exp_())
        self.peak = peak
        self.total = self.total.mul_(decay).add_(self.tiles.sum(weight))
        value = self.tiles.of_keys(self.call.v, self.block.heads, keys)
        if (kept := self.tiles.kept(self.block, keys)) is not None:
            weight.mul_(kept)
        self.weighted.mul_(decay).baddbmm_(weight, value)

    def out(self) -> Tensor:
        total, blind = self.total, self.total == 0
        if self.call.terms.sinks is not None:
            base = self.peak.masked_fill(self.peak == -torch.inf, 0)
            total = total + torch.exp(self.tiles.of_each_row(self.call.terms.sinks, self.block) - base)
        if self.call.dropout is not None:
            total = total * (1 - self.call.dropout.p)
        return self.weighted / total.masked_fill(blind, 1)

    def entropy(self) -> Tensor:
        total = self.total.masked_fill(self.total == 0, 1)
        return (total.log() - self.spread / total).clamp_(min=0)

    def lse(self) -> Tensor:
        return self.peak + self.total.log()
