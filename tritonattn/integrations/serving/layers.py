"""Calls of a served layer: the rows of one step, over pages of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ...backends import BACKENDS, choose
from ...calls.dispatch import finished, resolve, with_terms
from ...calls.formulas import by_formulas
from ...calls.paged_statistics import PagedKeyStatistics
from ...calls.varlen import Packing
from ...core.call import Request
from ...core.eight_bit import EIGHT_BIT, Descale
from ...core.invariance import is_invariant
from ...core.ranges import window_sides
from ...core.terms import Terms
from ...core.visibility import Visibility
from .settings import LayerFactor


@dataclass(eq=False)
class Step:
    """The rows of one step: first sequences of one new token each, then the others.

    tokens        new tokens of all sequences
    slots         int64 [tokens], where their keys go in the cache; -1 of padding
    new_ends      int32 [sequences + 1], 0 and where the new tokens of each sequence end
    lengths       int32 [sequences], the sequences' keys, new ones included
    block_table   int32 [sequences, pages]
    passes        times that new keys are entered in the record of key norms
    decodes       sequences of one new token
    chunks        where the rows of the others end, counted from the first of them, and the running sums of their keys,
                  old ones included; bounds on one sequence's; None where there are none

    Layers compute together what depends on the step alone: the first that needs it does, so that a CUDA graph captures
    that too.
    """

    tokens: int
    slots: Tensor
    new_ends: Tensor
    lengths: Tensor
    block_table: Tensor
    passes: int
    decodes: int
    chunks: Packing | None
    _kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """compute(), which depends on the step and the key alone. Memory of a captured graph is the graph's."""
        key = (key, self.slots.is_cuda and torch.cuda.is_current_stream_capturing())
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]

    def in_chunks(self, size: int, page: int) -> Step:
        """The step of layers whose rows attend within chunks of `size` keys, a multiple of `page`: row i of a sequence
        to the keys from i - i % size on.

        Chunks that hold new tokens are its sequences, and behind them empty ones: shapes alone decide how many.
        """
        return self.once(("chunks", size), lambda: self._in_chunks(size, page))

    def _in_chunks(self, size: int, page: int) -> Step:
        lengths, ends = self.lengths.long(), self.new_ends.long()
        count, width = self.lengths.shape[0], self.block_table.shape[1]
        most = count if self.chunks is None else 2 * count - self.decodes + self.tokens // size
        begun = (lengths - ends.diff()).clamp(min=0) // size
        held = (-(-lengths // size) - begun).clamp(min=1).cumsum(0)  # one at least, for each of the decodes
        chunk = torch.arange(most, device=lengths.device)
        owner = torch.searchsorted(held, chunk, right=True).clamp(max=count - 1)
        first = (chunk + (begun - F.pad(held, (1, 0))[:-1])[owner]) * size
        stop = torch.minimum(first + size, lengths[owner])
        pages = first[:, None] // page + torch.arange(min(size // page, width), device=lengths.device)
        table = self.block_table[owner[:, None], pages.clamp(max=width - 1)]
        new_ends = F.pad(ends[1:][owner] - lengths[owner] + stop, (1, 0)).int()
        keys, packing, decodes = (stop - first).clamp(min=0).int(), self.chunks, self.decodes
        if packing is not None:
            longest = min(packing.max_seqlen_q, size), min(packing.max_seqlen_k, size)
            packing = Packing(new_ends[decodes:] - decodes, key_ends(keys[decodes:]), *longest, table[decodes:])
        return Step(self.tokens, self.slots, new_ends, keys, table, self.passes, decodes, packing)


def key_ends(lengths: Tensor) -> Tensor:
    """int32 [sequences + 1]: 0 and the running sums of the sequences' keys."""
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


@dataclass(eq=False)
class ServedLayer:
    """A server's layer: its factor, and the terms of its logits besides.

    window      (left, right), or None
    sinks       float32 [Hq], or None
    backend, batch_invariant   as in `tritonattn.attention`
    owner       the server's backend, which messages name
    """

    factor: LayerFactor
    window: tuple[int, int] | None
    softcap: float | None
    sinks: Tensor | None
    backend: str
    batch_invariant: bool | None
    owner: str

    def attend(
        self,
        query: Tensor,
        pages: tuple[Tensor, Tensor],
        step: Step,
        statistics: PagedKeyStatistics | None,
        output: Tensor,
        descales: tuple[Descale | None, Descale | None] = (None, None),
    ) -> None:
        """Attend with query [tokens, Hq, D] to keys and values [N, page, Hkv, D], into output [tokens, Hq, D].

        descales   of 8-bit keys and values, as of `core.eight_bit`
        """
        k, v = (x.transpose(1, 2) for x in pages)
        if first := step.decodes:
            q, table = query[:first, :, None], step.block_table[:first]
            call = self._call(q, k, v, self._decode_visibility(q, k, step), table, statistics, descales)
            output[:first] = self._out(call)[:, :, 0]
        if step.chunks is not None:
            rows = query[first : step.tokens]
            visible, q = self._chunk_visibility(rows, pages[0], step, step.chunks), rows.transpose(0, 1)[None]
            call = self._call(q, k, v, visible, step.chunks.block_table, statistics, descales)
            output[first : step.tokens] = self._out(call)[0].transpose(0, 1)

    def _decode_visibility(self, q: Tensor, k: Tensor, step: Step) -> Visibility:
        lengths, left = step.lengths[: step.decodes], window_sides(self.window)[0]
        invariant = is_invariant(self.batch_invariant)
        sizes = (q.shape[0], q.shape[1], k.shape[1], 1, k.shape[2] * step.block_table.shape[1])

        def visible() -> Visibility:
            return Visibility.of_padded(sizes, q.device, lengths, left=left, invariant=invariant)

        return step.once(("decodes", sizes, left, invariant), visible)

    def _chunk_visibility(self, rows: Tensor, pages: Tensor, step: Step, packing: Packing) -> Visibility:
        window, invariant = self.window, is_invariant(self.batch_invariant)

        def visible() -> Visibility:
            keys = packing.keys(pages)
            return packing.visibility(rows, pages, keys, causal=True, window=window, invariant=invariant)

        return step.once(("chunks", rows.shape[1], pages.shape[2], window, invariant), visible)

    def _call(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible: Visibility,
        block_table: Tensor | None,
        record: PagedKeyStatistics | None,
        descales: tuple[Descale | None, Descale | None],
    ) -> Request:
        sinks = None if self.sinks is None else self.sinks[:, None].expand(visible.rows)
        request = Request(
            q,
            k,
            v,
            visible,
            Terms(softcap=self.softcap, sinks=sinks),
            block_table=block_table,
            scaling=self.factor.scaling,
            gain=self.factor.gain,
            backend=self.backend,
            statistics=record,
            cached=self.owner,
            k_descale=descales[0],
            v_descale=descales[1],
        )
        return request.changed(backend=choose(request).name)

    def _out(self, request: Request) -> Tensor:
        """out of a request, with the terms of its logits from another layer of the step that has the same."""
        backend = BACKENDS[request.backend]
        if backend.by_formulas:
            return by_formulas(request).out
        if self.factor.shared is None or isinstance(request.k_descale, Tensor):
            call = resolve(request, backend)
        else:
            key = self.factor.shared, self.softcap, request.k_descale
            terms = request.visibility.once(key, lambda: resolve(request, backend).terms)
            call = with_terms(request, backend, terms._replace(sinks=request.terms.sinks))
        out = ops.attention(call).out
        return finished(out, request) if call.v.dtype == EIGHT_BIT else out
