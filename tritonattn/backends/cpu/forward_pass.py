"""Output and row statistics, by a softmax that grows with every tile of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.call import AttentionCall, ForwardResult
from ...core.rounding import lost_in_rounding
from .tiles import Block, Tiles, exp_, logits_of, tiles_of


def forward(call: AttentionCall, aux: bool, rounding: Tensor | None = None) -> ForwardResult:
    """Compute the output and lse of a call, and with aux its max_logit and entropy.

    rounding, int8 and shaped like the output, receives what the output lost when it was rounded: `core.rounding`.
    """
    tiles = tiles_of(call)
    rows = call.q.shape[:3]
    out = call.v.new_empty(*rows, call.v.shape[3])
    lse, max_logit, entropy = (call.q.new_empty(rows, dtype=tiles.dtype) for _ in range(3))
    for heads in tiles.heads():
        for block in tiles.blocks(heads):
            softmax = _Softmax(tiles, block, aux)
            for keys, hidden in tiles.keys_of(block, tiles.spans_of(block)):
                softmax.add(keys, hidden)
            exact = softmax.out()
            rounded = exact.to(out.dtype)
            tiles.store(out, rounded, block)
            if rounding is not None:
                tiles.store(rounding, lost_in_rounding(exact, rounded), block)
            tiles.store(lse, softmax.lse(), block)
            if aux:
                tiles.store(max_logit, softmax.max_logit, block)
                tiles.store(entropy, softmax.entropy(), block)
    return ForwardResult(out, lse, max_logit, entropy) if aux else ForwardResult(out, lse)


class _Softmax:
    """The softmax of a block's rows over the keys so far, and the values that it weighs.

    peak       largest logit z, after the softcap
    total      sum of exp(z - peak)
    weighted   sum of exp(z - peak) * v, over the pairs that dropout keeps
    spread     sum of exp(z - peak) * (z - peak)
    max_logit  largest logit before the softcap, or with biases after it where they are added there

    Each is [N, G * rows, 1] or [N, G * rows, Dv]; spread and max_logit are kept only with aux.
    """

    def __init__(self, tiles: Tiles, block: Block, aux: bool) -> None:
        self.tiles, self.block, self.call, self.aux = tiles, block, tiles.call, aux
        self.query = query = tiles.of_rows(self.call.q, block)
        self.factor = self.call.logits.scale
        if self.call.logits.query_scale is not None:
            self.factor = tiles.of_each_row(self.call.logits.query_scale, block) * self.call.logits.scale
        self.peak = query.new_full((*query.shape[:2], 1), -torch.inf)
        self.max_logit = self.peak
        self.total, self.spread = torch.zeros_like(self.peak), torch.zeros_like(self.peak)
        self.weighted = query.new_zeros(*query.shape[:2], self.call.v.shape[3])

    def add(self, keys: slice, hidden: Tensor | None) -> None:
        """Add a span of keys."""
        logit = self._logits(keys, hidden)
        peak = torch.maximum(self.peak, logit.amax(-1, keepdim=True))
        base = peak.masked_fill(peak == -torch.inf, 0)
        weight = exp_(logit.sub_(base))
        decay = torch.exp(self.peak - base)
        if self.aux:
            shift = torch.where(decay > 0, self.peak - base, 0)
            self.spread = (self.spread + shift * self.total) * decay
            self.spread -= self.tiles.sum(torch.special.entr(weight))
        self.peak = peak
        self.total = self.total.mul_(decay).add_(self.tiles.sum(weight))
        value = self.tiles.of_keys(self.call.v, self.block.heads, keys)
        self.weighted.mul_(decay).baddbmm_(self.tiles.drop(weight, self.block, keys), value)

    def out(self) -> Tensor:
        total, blind = self.total, self.total == 0
        if self.call.logits.sinks is not None:
            base = self.peak.masked_fill(self.peak == -torch.inf, 0)
            total = total + torch.exp(self.tiles.of_each_row(self.call.logits.sinks, self.block) - base)
        if self.call.dropout is not None:
            total = total * (1 - self.call.dropout.p)
        return self.weighted / total.masked_fill(blind, 1)

    def lse(self) -> Tensor:
        return self.peak + self.total.log()

    def entropy(self) -> Tensor:
        empty = self.total == 0
        total = self.total.masked_fill(empty, 1)
        return (total.log() - self.spread / total).masked_fill(empty, 0).clamp(min=0)

    def _logits(self, keys: slice, hidden: Tensor | None) -> Tensor:
        tiles, block, softcap = self.tiles, self.block, self.call.logits.softcap
        logit = logits_of(self.query, self.factor, tiles.scaled_keys(block.heads, keys))
        if softcap is not None and self.call.logits.bias_after_softcap:
            logit, softcap = logit.div_(softcap).tanh_().mul_(softcap), None
        tiles.add_bias(logit, block, keys)
        tiles.hide(logit, block, hidden)
        if self.aux:
            self.max_logit = torch.maximum(self.max_logit, logit.amax(-1, keepdim=True))
        if softcap is not None:
            logit = logit.div_(softcap).tanh_().mul_(softcap)
            tiles.hide(logit, block, hidden)
        return logit
