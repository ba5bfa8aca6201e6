"""Context parallel attention by all-gather: every row meets all of its keys in one call, so nothing is merged.

Keys and values are gathered in the forward, some heads at a time, and again in the backward, so that only this rank's
part is kept in between. Gradients of keys and values are summed over ranks in fp32.

Source: Llama Team 2024, arXiv:2407.21783, section 3.3.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..core.call import AttentionCall, ForwardResult
from ..core.terms import Gradients
from . import collectives
from .pieces import ALL_KEYS, Held, Piece, Result, Schedule, attend
from .sequence import SharedCall


def attention(call: AttentionCall, shared: SharedCall) -> ForwardResult:
    return attend(call, _Gathering(shared))


class _Gathering(Schedule):
    """Keys and values of all ranks, some heads after the other."""

    is_part = False

    def held(self, k: Tensor, v: Tensor, sums: Gradients | None = None) -> Iterator[Held]:
        split, group = self.shared.sequence.split, self.shared.sequence.whole.q_heads // max(k.shape[1], 1)
        totals = (None, None) if sums is None else sums[1:3]
        for first in range(0, k.shape[1], self.shared.heads):
            heads = slice(first, min(first + self.shared.heads, k.shape[1]))
            keys = collectives.gathered(k[:, heads].to(v.dtype), split, 2).to(k.dtype)
            values = collectives.gathered(v[:, heads], split, 2)
            gradients = [
                None if total is None else self.zeros(x, v) for total, x in zip(totals, (keys, values), strict=True)
            ]
            held = Held(keys, values, self._pieces(slice(heads.start * group, heads.stop * group), heads), gradients)
            yield held
            for total, whole in zip(totals, held.gradients, strict=True):
                if total is not None and whole is not None:
                    total[:, heads] = collectives.scattered(whole, split, 2).to(total.dtype)

    def _pieces(self, q_heads: slice, kv_heads: slice) -> list[Piece]:
        """Chunk by chunk, so that keys behind a causal chunk are left out; one where rows attend to any key."""
        sequence = self.shared.sequence
        split, whole, length = sequence.split, sequence.whole, sequence.visibility.q_len
        n = length // split.chunks_per_rank
        left = whole.left if whole.sequences is None else None
        reach = sequence.length if left is None else left
        spans = [((i * n, (i + 1) * n), (max(0, c * n - reach), (c + 1) * n)) for i, c in enumerate(split.chunks())]
        if not sequence.ends_at_rows:
            spans = [((0, length), (0, sequence.length))]
        window = (left, 0) if sequence.ends_at_rows and whole.sequences is None else None
        window = ALL_KEYS if sequence.visibility.key_ranges is None else window
        return [
            Piece(slice(*rows), slice(*keys), slice(*keys), keys[0], window, True, q_heads, kv_heads)
            for rows, keys in spans
        ]

    def rows(self, q: Tensor, v: Tensor, sinks: Tensor | None, results: Iterable[Result]) -> tuple[Tensor, ...]:
        rows, wide = q.shape[:3], torch.promote_types(q.dtype, torch.float32)
        of_aux = rows if self.shared.aux else (0,)
        out = v.new_empty((*rows, v.shape[3]))
        rounding = torch.empty_like(out, dtype=torch.int8) if self.shared.keep_rounding else out.new_empty(0)
        found = out, *(q.new_empty(shape, dtype=wide) for shape in (rows, of_aux, of_aux)), rounding
        for piece, parts in results:
            for total, part in zip(found, parts, strict=True):
                if part.dim() > 1:  # else it is not asked for
                    total[:, piece.q_heads, piece.rows] = part
        return found
