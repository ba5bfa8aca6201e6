"""Cut a call into tiles; find the tiles that some row attends to, and the hidden pairs in each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ...core.call import AttentionCall
from ...core.pair_biases import reflected, sums_of_diagonals
from ...core.terms import TABLES, Gradients, Terms, addends
from ...core.visibility import Visibility

# Rows (over all query heads of a group) and keys of a tile; pairs of all tiles that are computed together.
_ROWS = 256
KEYS = 256
_PAIRS = 1 << 20
# Pairs whose bits of dropout are drawn together, so that their words stay in cache.
_DRAWN = 1 << 18


@dataclass(frozen=True)
class Heads:
    """Batch entries, query heads and key heads whose tiles are computed together."""

    batch: slice
    queries: slice
    keys: slice


@dataclass(frozen=True)
class Block:
    """Some query rows of some heads, and the keys outside which they attend to none."""

    heads: Heads
    rows: slice
    keys: slice

    @property
    def index(self) -> tuple[slice, slice, slice]:
        """The index of the block in a tensor [B, Hq, Sq, ...]."""
        return self.heads.batch, self.heads.queries, self.rows


class Tiles:
    """An AttentionCall cut into tiles.

    Rows of a block are folded to [N, G * rows, ...], keys to [N, keys, ...]; N is batch entries times key heads. The G
    query heads of a key head lie one after the other, so that keys and values are never repeated. Everything is
    widened to dtype: fp32 (fp64 for fp64 q) unless given.

    joins_spans   a backward takes all keys of a block of rows at once
    """

    joins_spans = False

    def __init__(self, call: AttentionCall, dtype: torch.dtype | None = None) -> None:
        visible = call.visibility
        self.call = call
        self.dtype = dtype or torch.promote_types(call.q.dtype, torch.float32)
        self.group = visible.q_heads // max(visible.kv_heads, 1)
        self.row_step = max(1, _ROWS // max(self.group, 1))
        self.readable = readable(visible.device)
        self.sequences = self._sequences()
        self.lo, self.hi = visible.ranges()  # [B or 1, Sq]
        self.first, self.last = self._host_bounds()
        self.unseen = None if visible.attends_to_every_key else ~visible.seen_keys()  # [B or 1, 1 or Hkv, Sk]
        self.holes = self._holes()
        terms = call.terms
        biases = addends(terms)
        hides_none = self.readable and all(bool(x.amin() > -torch.inf) for x in biases)
        self.bias_hides = len(biases) > 0 and not hides_none
        has_tables = any(getattr(terms, name) is not None for name in TABLES)
        self.offset = visible.positions() + terms.relative_right if has_tables else None

    def heads(self) -> Iterator[Heads]:
        """Slices of all heads, each of as many as `_PAIRS` allows."""
        visible, group = self.call.visibility, self.group
        longest_q = max((rows.stop - rows.start for rows, _ in self.sequences), default=0)
        longest_k = max((keys.stop - keys.start for _, keys in self.sequences), default=0)
        pairs = min(self.row_step, longest_q) * group * min(KEYS, longest_k)
        fitting = max(1, _PAIRS // max(pairs, 1))
        head_step = max(1, min(fitting, visible.kv_heads))
        batch_step = fitting // head_step if head_step == visible.kv_heads else 1
        for entry in range(0, visible.batch, batch_step):
            batch = slice(entry, min(entry + batch_step, visible.batch))
            for head in range(0, visible.kv_heads, head_step):
                keys = slice(head, min(head + head_step, visible.kv_heads))
                yield Heads(batch, slice(keys.start * group, keys.stop * group), keys)

    def blocks(self, heads: Heads) -> Iterator[Block]:
        """All rows of some heads."""
        for rows, keys in self.sequences:
            for part in _cut(rows, self.row_step):
                yield Block(heads, part, keys)

    def keys_of(self, block: Block, spans: list[tuple[slice, bool]]) -> Iterator[tuple[slice, Tensor | None]]:
        """Yield the spans of `spans_of(block)` that some row may attend to, with hidden pairs, or None for none.

        Hidden pairs are bool, broadcastable to [batch entries, key heads, G, rows, keys]. A bias of -inf hides a pair.
        """
        mask = self.call.visibility.mask
        for keys, is_whole in spans:
            hidden = None
            if not (is_whole and mask is None and self._bounds_decide()):
                hidden = self._hidden(block, keys)
            if self.bias_hides:
                weightless = self._bias(block, keys, self.call.terms) == -torch.inf
                hidden = weightless if hidden is None else hidden | weightless
            if hidden is None or (mask is None and not self.bias_hides) or not self.readable:
                yield keys, hidden
            elif not hidden.all():
                yield keys, hidden if hidden.any() else None

    def spans_of(self, block: Block) -> list[tuple[slice, bool]]:
        """The spans of keys that the range of some row touches, each with True where all ranges hold it."""
        spans, batch = _cut(block.keys, KEYS), block.heads.batch
        first, last = (sliced(bound, batch, block.rows)[..., None] for bound in (self.first, self.last))
        start, stop = (first.new_tensor([getattr(keys, end) for keys in spans]) for end in ("start", "stop"))
        touched = ((first < stop) & (last > start)).flatten(0, 1).any(0).tolist()
        whole = ((first <= start) & (last >= stop)).flatten(0, 1).all(0).tolist()
        return [
            (keys, is_whole) for keys, is_touched, is_whole in zip(spans, touched, whole, strict=True) if is_touched
        ]

    def of_rows(self, x: Tensor, block: Block) -> Tensor:
        """The block of x [B, Hq, Sq, C], widened: [N, G * rows, C]."""
        x = x[block.index].to(self.dtype)
        return x.unflatten(1, (-1, self.group)).flatten(2, 3).flatten(0, 1)

    def of_each_row(self, x: Tensor, block: Block) -> Tensor:
        """The block of x [B, Hq, Sq], widened: [N, G * rows, 1]."""
        return self.of_rows(x[..., None], block)

    def softcap_of(self, block: Block) -> float | Tensor | None:
        """The cap of a block's rows: a number, or [N, G * rows, 1]; 1 for 0, as of padding, whose logits are 0."""
        softcap = self.call.terms.softcap_of_rows()
        if not isinstance(softcap, Tensor):
            return softcap
        of_rows = self.of_each_row(softcap, block)
        return of_rows.masked_fill(of_rows == 0, 1.0)

    def of_keys(self, x: Tensor, heads: Heads, keys: slice | None = None) -> Tensor:
        """Some or all keys of x [B, Hkv, Sk, C], widened, zero where no row attends to them: [N, keys, C]."""
        keys = slice(0, x.shape[2]) if keys is None else keys
        x = x[heads.batch, heads.keys, keys].to(self.dtype)
        if self.unseen is not None and (self.holes is None or self.holes[keys.start] < self.holes[keys.stop]):
            x = x.masked_fill(sliced(self.unseen, heads.batch, heads.keys)[..., keys, None], 0)
        return x.flatten(0, 1)

    def scaled_keys(self, heads: Heads, keys: slice) -> Tensor:
        """k * key_scale: [N, keys, D]."""
        key = self.of_keys(self.call.k, heads, keys)
        if self.call.terms.key_scale is None:
            return key
        return key * self.of_keys(self.call.terms.key_scale[..., None], heads, keys)

    def add_bias(self, logit: Tensor, block: Block, keys: slice, terms: Terms | Gradients | None = None) -> None:
        """Add the biases of the call, or of other terms such as their tangents, to logit [N, G * rows, keys]."""
        terms = self.call.terms if terms is None else terms
        if addends(terms):
            rows, width = block.rows.stop - block.rows.start, keys.stop - keys.start
            self.by_head(logit, block)[..., :rows, :width].add_(self._bias(block, keys, terms))

    def of_distance(
        self, block: Block, keys: slice, hidden: Tensor | None, table: Tensor | None, fill: float = 1.0
    ) -> Tensor | None:
        """A tile of a relative scale, or with a fill of 0 of its tangent; None for None. Axes as of `_bias`.

        The fill stands where pairs are hidden, too: what a table holds for them reaches no gradient.
        """
        if table is None:
            return None
        found = reflected(sliced(table, *block.index), self._offset_of(block), keys, fill=fill)
        found = self._grouped(found.to(self.dtype))
        if hidden is None:
            return found
        rows, width = found.shape[-2:]
        return torch.where(hidden[..., :rows, :width], fill, found)

    def scale_pairs(self, x: Tensor, of_distance: Tensor | None, block: Block) -> None:
        """Multiply x [N, G * rows, keys] by a tile of `of_distance`, or, for None, by 1."""
        if of_distance is not None:
            rows, width = of_distance.shape[-2:]
            self.by_head(x, block)[..., :rows, :width].mul_(of_distance)

    def hide(self, logit: Tensor, block: Block, hidden: Tensor | None, value: float = -torch.inf) -> None:
        """Overwrite the hidden pairs of logit [N, G * rows, keys] by -inf, or by 0.

        Bitwise, NaN too: a masked fill takes 3 times as long, and 20 times where pairs are hidden at random.
        """
        if hidden is None:
            return
        is_wide = logit.dtype == torch.float64
        words = self.by_head(logit, block).view(torch.int64 if is_wide else torch.int32)
        visible = hidden.to(words.dtype).sub_(1)
        words.bitwise_and_(visible)
        if value:
            words.bitwise_or_(~visible & -(1 << (52 if is_wide else 23)))  # sign and exponent

    def kept(self, block: Block, keys: slice) -> Tensor | None:
        """1 for the pairs that dropout keeps, 0 for others: uint8 [N, G * rows, keys], or None without dropout."""
        dropout, visible = self.call.dropout, self.call.visibility
        if dropout is None:
            return None
        batch, queries = block.heads.batch, block.heads.queries
        head = torch.arange(queries.start, queries.stop, device=self.lo.device)[:, None]
        row = torch.arange(block.rows.start, block.rows.stop, device=head.device)
        first = visible.sequence_begins()
        if isinstance(first, Tensor) and not self.readable:  # one batch entry, and keys begin anywhere in a sequence
            key = torch.arange(keys.start, keys.stop, device=head.device)
            kept = dropout.keep(0, head[..., None], row[:, None], key, first[block.rows, None], visible.q_heads)[None]
        else:
            shape = (batch.stop - batch.start, len(head), len(row), keys.stop - keys.start)
            kept = torch.empty(shape, dtype=torch.bool, device=head.device)
            step = max(1, _DRAWN // max(shape[2] * shape[3], 1))
            for entry, tiles in enumerate(kept, batch.start):
                for heads, tile in zip(head.split(step), tiles.split(step), strict=True):
                    dropout.keep_run(tile, entry, heads, row, keys.start, visible.q_heads)
        # A product with bytes takes an eighth of the time of a masked fill.
        return kept.view(torch.uint8).view(-1, self.group * len(row), kept.shape[-1])

    def sum(self, x: Tensor) -> Tensor:
        """Sum of x [N, G * rows, C] over C: [N, G * rows, 1]."""
        return x.sum(-1, keepdim=True)

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum of x * y over the last axis, which stays as one entry."""
        return torch.linalg.vecdot(x, y)[..., None]

    def add_product(self, sums: Tensor, keys: slice, x: Tensor, y: Tensor) -> None:
        """Add the product of x [N, keys, G * rows] and y [N, G * rows, C] to sums [N, Sk, C]."""
        sums[:, keys].baddbmm_(x, y)

    def store(self, whole: Tensor, part: Tensor, block: Block) -> None:
        """Put a block [N, G * rows, C] into [B, Hq, Sq, C], or [N, G * rows, 1] into [B, Hq, Sq]."""
        target = whole[block.index]
        target.copy_(part.view(target.shape))

    def by_head(self, x: Tensor, block: Block) -> Tensor:
        """Separate the heads of x [N, G * rows, C]: [batch entries, key heads, G, rows, C]."""
        batch, heads = block.heads.batch, block.heads.keys
        shape = (batch.stop - batch.start, heads.stop - heads.start, self.group)
        return x.view(*shape, block.rows.stop - block.rows.start, x.shape[-1])

    def _sequences(self) -> list[tuple[slice, slice]]:
        """Rows and the keys that they may attend to: one part, or one per packed sequence."""
        visible = self.call.visibility
        whole = (slice(0, visible.q_len), slice(0, visible.k_len))
        if visible.sequences is None or not self.readable:
            return [whole]
        q_starts, k_starts = visible.sequences.q_starts.tolist(), visible.sequences.k_starts.tolist()
        parts = [
            (slice(*rows), slice(*keys)) for rows, keys in zip(pairwise(q_starts), pairwise(k_starts), strict=True)
        ]
        return [*parts, (slice(q_starts[-1], visible.q_len), slice(0, 0))]

    def _host_bounds(self) -> tuple[Tensor, Tensor]:
        """First and one past the last key of each row, in host memory, [B or 1, Sq]; (Sk, 0) for none."""
        lo, hi = self.lo, self.hi
        if not self.readable:
            lo, hi = self._visibility_of_sizes().ranges()
        empty = lo >= hi
        return lo.masked_fill(empty, self.call.visibility.k_len), hi.masked_fill(empty, 0)

    def _visibility_of_sizes(self) -> Visibility:
        """The visibility by sizes, causal and window alone, in host memory."""
        visible, cpu = self.call.visibility, torch.device("cpu")
        shape = (visible.batch, visible.q_heads, visible.kv_heads, visible.q_len, visible.k_len)
        if visible.sequences is not None:  # there causal and window start from each sequence
            return Visibility(*shape, cpu)
        return Visibility(*shape, cpu, visible.left, visible.right)

    def _bounds_decide(self) -> bool:
        visible = self.call.visibility
        values = (visible.key_lengths, visible.key_ranges, visible.sequences)
        return self.readable or all(part is None for part in values)

    def _holes(self) -> list[int] | None:
        """The number of keys before each that are unseen somewhere; None where values are not read."""
        if self.unseen is None or not self.readable:
            return None
        holes = self.unseen.flatten(0, -2).any(0)
        return [0, *holes.cumsum(0).tolist()]

    def _bias(self, block: Block, keys: slice, terms: Terms | Gradients) -> Tensor:
        """The sum of a tile's biases, widened: each axis of [batch entries, key heads, G, rows, keys] or 1."""
        heads, total = block.heads, None
        if terms.key_bias is not None:
            total = terms.key_bias[heads.batch, heads.keys, :, None, keys].to(self.dtype)
        of_pairs = []
        if terms.bias is not None:
            of_pairs.append(sliced(terms.bias, *block.index, keys))
        if terms.relative_bias is not None:
            of_pairs.append(reflected(sliced(terms.relative_bias, *block.index), self._offset_of(block), keys))
        for pairs in of_pairs:
            pairs = self._grouped(pairs.to(self.dtype))
            total = pairs if total is None else total + pairs
        assert total is not None
        return total

    def _offset_of(self, block: Block) -> Tensor:
        """The entry of the relative bias at key 0 of each row: int64 [batch entries or 1, rows]."""
        assert self.offset is not None
        return sliced(self.offset, block.heads.batch, block.rows)

    def add_gradients_of_pairs(self, d_logit: Tensor, block: Block, keys: slice, sums: Gradients) -> None:
        """Add those of a tile's logits [N, G * rows, keys] to the sums of bias and relative_bias, tile after tile."""
        if sums.bias is not None:
            target = sliced(sums.bias, *block.index, keys)
            target += self._pairs(d_logit, block, keys).sum_to_size(target.shape)
        if sums.relative_bias is not None:
            self.add_to_table(d_logit, block, keys, sums.relative_bias)

    def add_to_table(self, d_pairs: Tensor, block: Block, keys: slice, table: Tensor) -> None:
        """Add numbers of a tile's pairs [N, G * rows, keys] to the entries of their distances."""
        pairs, offset, table = self._pairs(d_pairs, block, keys), self._offset_of(block), sliced(table, *block.index)
        entries = self._entries(offset, keys, table.shape[3])
        target = table[..., entries]
        if table.shape[2] == 1 and offset.shape[0] == 1 and self.readable and bool((offset.diff() == 1).all()):
            first = entries.start + keys.stop - 1 - int(offset[0, 0])  # the diagonal of the first entry
            found = sums_of_diagonals(pairs)[..., None, first : first + target.shape[-1]]
        else:
            found = reflected(pairs, offset, entries, keys.start)
        target += found.sum_to_size(target.shape)

    def _pairs(self, x: Tensor, block: Block, keys: slice) -> Tensor:
        """x [N, G * rows, keys] as [batch entries, query heads, rows, keys], without padding."""
        rows = block.rows.stop - block.rows.start
        return self.by_head(x, block)[..., :rows, : keys.stop - keys.start].flatten(1, 2)

    def _entries(self, offset: Tensor, keys: slice, extent: int) -> slice:
        """The entries of a table that pairs of rows of these offsets and of these keys have."""
        if not self.readable:
            return slice(0, extent)
        least, most = map(int, offset.aminmax())
        first = min(max(least - keys.stop + 1, 0), extent)
        return slice(first, min(max(most - keys.start + 1, first), extent))

    def _grouped(self, x: Tensor) -> Tensor:
        """x [batch entries or 1, query heads or 1, ...] by key head and group."""
        return x.unflatten(1, (-1, self.group)) if x.shape[1] > 1 else x[:, None]

    def _hidden(self, block: Block, keys: slice) -> Tensor:
        batch = block.heads.batch
        lo, hi = (sliced(bound, batch, block.rows)[:, None, None, :, None] for bound in (self.lo, self.hi))
        key = torch.arange(keys.start, keys.stop, device=lo.device)
        hidden = (key < lo) | (key >= hi)
        mask = self.call.visibility.mask
        if mask is None:
            return hidden
        return hidden | ~self._grouped(sliced(mask, *block.index, keys))


def logits_of(query: Tensor, factor: Tensor | float, key: Tensor) -> Tensor:
    """(query . key) * factor, [N, G * rows, keys]; to round query * factor first would err more."""
    return torch.bmm(query, key.mT).mul_(factor)


def exp_(x: Tensor) -> Tensor:
    """exp(x) in place, and 0 for subnormal results, which would slow down every later product several times.

    x is bounded before: exp takes three times as long over -inf.
    """
    return without_smallest_(bounded_(x).exp_())


def bounded_(x: Tensor) -> Tensor:
    """x in place, and the smallest number whose exp is no subnormal one for smaller numbers and -inf."""
    return x.clamp_min_(math.log(torch.finfo(x.dtype).tiny) + 1e-3)


def without_smallest_(x: Tensor) -> Tensor:
    """exp of `bounded_` in place, with 0 where it was bounded."""
    return torch.threshold_(x, 1.01 * torch.finfo(x.dtype).tiny, 0.0)


def readable(device: torch.device) -> bool:
    """True where values are read to skip tiles. On other devices reading would wait, so only shapes decide."""
    return device.type == "cpu"


def _cut(whole: slice, step: int) -> list[slice]:
    return [slice(start, min(start + step, whole.stop)) for start in range(whole.start, whole.stop, step)]


def sliced(x: Tensor, *parts: slice) -> Tensor:
    """x[parts], where an axis of size 1 stands for any size."""
    return x[tuple(slice(None) if size == 1 else part for size, part in zip(x.shape, parts, strict=False))]
