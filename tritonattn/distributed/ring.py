"""Context parallel attention in a ring: parts of keys and values go round, and each rank merges its results over them.

At step s a rank holds the part of rank r - s, and passes it on while it computes. Rows are merged by their lse. In the
backward the parts go round again, each with its gradient, to which every rank adds; probabilities come from the lse of
all keys and delta from the output of all keys, so that a part's gradients are those of the whole. No rank ever holds
more than two parts.

Source: Liu et al. 2023, arXiv:2310.01889; merging of parts: Milakov & Gimelshein 2018, arXiv:1805.02867.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..core.call import AttentionCall, ForwardResult
from ..core.rounding import before_rounding, lost_in_rounding
from ..core.terms import Gradients
from . import collectives
from .pieces import ALL, ALL_KEYS, Held, Piece, Result, Schedule, attend
from .sequence import SharedCall, SharedSequence, share_with_sinks


def attention(call: AttentionCall, shared: SharedCall) -> ForwardResult:
    return attend(call, _Ring(shared))


class _Ring(Schedule):
    """The part of each rank after the other; the next one is on its way meanwhile."""

    is_part = True

    def held(self, k: Tensor, v: Tensor, sums: Gradients | None = None) -> Iterator[Held]:
        split = self.shared.sequence.split
        part, moving = [k.to(v.dtype), v], None
        for step in range(split.size):
            coming = collectives.pass_on(part, split) if step < split.size - 1 else None
            pieces = pieces_of(self.shared.sequence, (split.rank - step) % split.size, joins=not self.shared.aux)
            held = Held(part[0], part[1], pieces, [None if sums is None else self.zeros(x, v) for x in part])
            yield held
            if sums is not None:
                gradients = [x for x in held.gradients if x is not None]
                if moving is not None:
                    gradients = [mine + theirs for mine, theirs in zip(gradients, moving.wait(), strict=True)]
                moving = collectives.pass_on(gradients, split)
            if coming is not None:
                part = coming.wait()
        if sums is not None and moving is not None:
            for total, x in zip(sums[1:3], moving.wait(), strict=True):
                if total is not None:
                    total.copy_(x)

    def rows(self, q: Tensor, v: Tensor, sinks: Tensor | None, results: Iterable[Result]) -> tuple[Tensor, ...]:
        rows, wide, aux = q.shape[:3], torch.promote_types(q.dtype, torch.float32), self.shared.aux
        total = q.new_zeros((*rows, v.shape[3]), dtype=wide)  # over the keys so far
        lse = q.new_full(rows, -torch.inf, dtype=wide)
        max_logit, mean_logit = lse.clone(), torch.zeros_like(lse)
        for piece, (out, part_lse, part_max, entropy, rounding) in results:
            at = (ALL, ALL, piece.rows)
            joined = torch.logaddexp(lse[at], part_lse)
            shift = joined.masked_fill(joined == -torch.inf, 0)
            kept, new = (lse[at] - shift).exp(), (part_lse - shift).exp()
            exact = before_rounding(out, rounding) if rounding.numel() else out.to(wide)
            total[at] = total[at] * kept[..., None] + exact * new[..., None]
            if aux:
                max_logit[at] = torch.maximum(max_logit[at], part_max)
                mean = (part_lse - entropy).masked_fill(part_lse == -torch.inf, 0)
                mean_logit[at] = mean_logit[at] * kept + mean * new
            lse[at] = joined
        if sinks is not None:
            total = total * share_with_sinks(lse, sinks)[..., None]
        out = total.to(v.dtype)
        rounding = lost_in_rounding(total, out) if self.shared.keep_rounding else out.new_empty(0)
        entropy = (lse - mean_logit).masked_fill(lse == -torch.inf, 0).clamp(min=0)
        return out, lse, max_logit, entropy, rounding


def pieces_of(sequence: SharedSequence, source: int, joins: bool = True) -> list[Piece]:
    """The chunks of rows, and the chunks of the part of rank `source`, that sizes alone do not rule out.

    Two chunks that rows attend to up to the end, or but for the last one's diagonal, are taken at once where it joins:
    keys of other pieces may lie between them, so that no piece then tells which key of equal logits is the lowest.
    """
    split, whole = sequence.split, sequence.whole
    length = sequence.visibility.q_len
    n = length // split.chunks_per_rank
    left = None if whole.sequences is not None else whole.left
    is_causal = sequence.ends_at_rows and whole.left is None and whole.sequences is None
    found: list[Piece] = []
    for i, row in enumerate(split.chunks()):
        of_rows: list[Piece] = []
        for j, key in enumerate(split.chunks(source)):
            behind = sequence.ends_at_rows and key > row
            if behind or (left is not None and row * n - left >= (key + 1) * n):
                continue
            keys, vectors = (slice(start + j * n, start + (j + 1) * n) for start in (0, source * length))
            window = (None, 0) if is_causal and key == row else None
            if whole.is_full or (is_causal and key < row):
                window = ALL_KEYS
            of_rows.append(Piece(slice(i * n, (i + 1) * n), keys, vectors, key * n, window))
        if joins and len(of_rows) == 2 and of_rows[0].window == ALL_KEYS and of_rows[1].window is not None:
            first, last = of_rows
            keys, vectors = slice(first.keys.start, last.keys.stop), slice(first.vectors.start, last.vectors.stop)
            of_rows = [last._replace(keys=keys, vectors=vectors)]
        found += of_rows
    if len(found) == 2 and found[0].keys == found[1].keys and found[0].window == found[1].window == ALL_KEYS:
        found = [found[0]._replace(rows=slice(0, length))]
    return [piece._replace(has_sinks=source == split.rank and _has_keys_of_rows(piece)) for piece in found]


def _has_keys_of_rows(piece: Piece) -> bool:
    """True where rows and keys are of the same tokens, this rank's part."""
    return piece.keys.start <= piece.rows.start and piece.rows.stop <= piece.keys.stop
