"""Tiles of one shape, for calls whose bits must not depend on the rest of the batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...core.call import AttentionCall
from ...core.invariance import halving_sum
from . import tiles
from .tiles import Block, Heads, Tiles

_FIXED_ROWS = 32  # of a query head


class FixedTiles(Tiles):
    """Tiles of one shape, for calls in which the bits of a row must not depend on the rest of the batch.

    A product of matrices rounds otherwise where its shape is another. So tiles are padded to one shape and copied to
    new memory, a head at a time; keys are cut from the first key of a sequence on, rows from its first row on. A padded
    or hidden pair adds exactly 0. A block holds _FIXED_ROWS rows of each query head of one key head, a span KEYS keys.
    """

    joins_spans = True

    def __init__(self, call: AttentionCall) -> None:
        super().__init__(call)
        self.row_step = _FIXED_ROWS

    def heads(self) -> Iterator[Heads]:
        visible, group = self.call.visibility, self.group
        for entry in range(visible.batch):
            for head in range(visible.kv_heads):
                yield Heads(slice(entry, entry + 1), slice(head * group, (head + 1) * group), slice(head, head + 1))

    def keys_of(self, block: Block, spans: list[tuple[slice, bool]]) -> Iterator[tuple[slice, Tensor | None]]:
        rows = block.rows.stop - block.rows.start
        for keys, hidden in super().keys_of(block, spans):
            width = keys.stop - keys.start
            if rows < _FIXED_ROWS or width < tiles.KEYS:
                if hidden is None:
                    hidden = torch.zeros((1, 1, 1, rows, width), dtype=torch.bool)
                hidden = hidden.expand(*hidden.shape[:-2], rows, width)
                hidden = pad(hidden, (0, tiles.KEYS - width, 0, _FIXED_ROWS - rows), value=True)
            yield keys, hidden

    def of_rows(self, x: Tensor, block: Block) -> Tensor:
        tile = torch.zeros((1, self.group * _FIXED_ROWS, x.shape[-1]), dtype=self.dtype)
        x = x[block.index]  # [1, G, rows, C]
        tile.view(1, self.group, _FIXED_ROWS, -1)[:, :, : x.shape[2]] = x
        return tile

    def of_keys(self, x: Tensor, heads: Heads, keys: slice | None = None) -> Tensor:
        found = super().of_keys(x, heads, keys)
        if keys is None:
            return found
        tile = torch.zeros((1, tiles.KEYS, x.shape[-1]), dtype=self.dtype)
        tile[:, : found.shape[1]] = found
        return tile

    def sum(self, x: Tensor) -> Tensor:
        return halving_sum(x)

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        return halving_sum(x * y)

    def add_product(self, sums: Tensor, keys: slice, x: Tensor, y: Tensor) -> None:
        sums[:, keys] += torch.bmm(x, y)[:, : keys.stop - keys.start]

    def store(self, whole: Tensor, part: Tensor, block: Block) -> None:
        target = whole[block.index]
        target.copy_(self.by_head(part, block)[:, 0, :, : target.shape[2]].reshape(target.shape))

    def by_head(self, x: Tensor, block: Block) -> Tensor:
        return x.view(1, 1, self.group, _FIXED_ROWS, x.shape[-1])


def tiles_of(call: AttentionCall) -> Tiles:
    return FixedTiles(call) if call.visibility.invariant else Tiles(call)
