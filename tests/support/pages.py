"""Packed sequences over a paged KV cache, for public functions and for operators."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import tritonattn
from tests.support.packed import Packed, offsets
from tritonattn.calls import paged_statistics
from tritonattn.core.call import AttentionCall
from tritonattn.core.sequences import Sequences
from tritonattn.core.terms import Terms
from tritonattn.core.visibility import Visibility
from tritonattn.integrations.vllm.pages import RECORD, key_statistics

WILD = (-1, 1 << 30)


class PagedBatch:
    """Sequences of some rows and keys, whose keys lie in pages of shuffled numbers; NaN everywhere else.

    k and v lie in one tensor of pages [N, Hkv, page, D + Dv], as vLLM has them. The first `shared` pages of all
    sequences that fill them are the same ones. Entries of the table behind a sequence's keys are wild.
    """

    def __init__(
        self, q_lengths, k_lengths, page=16, shared=0, dtype=torch.float64, dims=(8, 6), heads=(4, 2), tails=(0, 0)
    ) -> None:
        (heads, kv_heads), self.widths = heads, list(dims)
        self.packed, self.page = Packed(tuple(q_lengths), tuple(k_lengths), *tails), page
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

        self.q, self.kv = normal(self.packed.q_len, heads, dims[0]), normal(self.packed.k_len, kv_heads, sum(dims))
        sequences, full = [keys for _, keys in self.packed.sequences()], shared * page
        sharing = [keys for keys in sequences if keys.stop - keys.start >= max(full, 1)]
        for keys in sharing:
            self.kv[keys.start : keys.start + full] = self.kv[sharing[0].start : sharing[0].start + full]
        longest = -(-max(k_lengths, default=0) // page) + 1
        numbers = torch.randperm(len(sequences) * longest + 2, generator=draw)
        table = numbers[: len(sequences) * longest].view(len(sequences), longest)
        self.table = torch.tensor(WILD, dtype=torch.int32)[torch.arange(longest) % 2].repeat(len(sequences), 1)
        self.pages = normal(len(numbers), kv_heads, page, sum(dims)).fill_(torch.nan)
        for n, keys in enumerate(sequences):
            if keys in sharing:
                table[n, :shared] = table[sequences.index(sharing[0]), :shared]
            used = -(-(keys.stop - keys.start) // page)
            self.table[n, :used] = table[n, :used].int()
            for j, key in enumerate(range(keys.start, keys.stop)):
                self.pages[table[n, j // page], :, j % page] = self.kv[key]

    @property
    def k(self) -> Tensor:
        """The packed keys, [T_k, Hkv, D]."""
        return self.kv.split(self.widths, -1)[0]

    @property
    def v(self) -> Tensor:
        return self.kv.split(self.widths, -1)[1]

    @property
    def key_lengths(self) -> Tensor:
        return torch.tensor(self.packed.k_lengths)

    def contiguous(self) -> dict:
        """The arguments of `attention_varlen` without pages."""
        return {"q": self.q, "k": self.k, "v": self.v, **self.packed.arguments()}

    def arguments(self) -> dict:
        """The arguments of `attention_varlen` over the pages."""
        k, v = self.pages.transpose(1, 2).split(self.widths, -1)
        return {"q": self.q, "k": k, "v": v, **self.packed.arguments(), "block_table": self.table}


def paged_call(
    packed: Packed,
    dtype: torch.dtype,
    page: int,
    *,
    heads: tuple[int, int] = (2, 1),
    dims: tuple[int, int] = (16, 16),
    lost: tuple[int, int] | None = None,
    terms: tuple[str, ...] = (),
    softcap: float | None = None,
    device: torch.device | str = "cpu",
    **masks: Any,
) -> tuple[AttentionCall, AttentionCall]:
    """(call over pages, call over packed keys), with vectors of the logits by name.

    lost   a sequence and its page whose number is wild, and whose keys are zeros
    """
    (q_heads, kv_heads), (q_len, k_len), tails = heads, (packed.q_len, packed.k_len), (packed.q_tail, packed.k_tail)
    batch = PagedBatch(packed.q_lengths, packed.k_lengths, page, 0, dtype, dims, heads, tails)
    if lost is not None:
        keys = packed.sequences()[lost[0]][1]
        batch.kv[keys][lost[1] * page : (lost[1] + 1) * page] = 0
        batch.table[lost] = WILD[1]
    q, k, v = (x.transpose(0, 1)[None].contiguous().to(device) for x in (batch.q, batch.k, batch.v))
    random = torch.Generator().manual_seed(0)
    shapes = {"query_scale": (1, q_heads, q_len), "key_scale": (1, kv_heads, k_len), "sinks": (1, q_heads, q_len)}
    shapes["key_bias"] = (1, kv_heads, q_heads // kv_heads, k_len)
    vectors = {name: torch.randn(shapes[name], generator=random).to(device) for name in terms}
    if "query_scale" in terms:
        vectors["query_scale"] = vectors["query_scale"].abs() + 0.5
    longest = max(packed.q_lengths), max(packed.k_lengths)
    ends = (offsets(lengths).to(device) for lengths in (packed.q_lengths, packed.k_lengths))
    visible = Visibility.of(q, k, sequences=Sequences.of(*ends, q_len, k_len, *longest), **masks)
    whole = AttentionCall(q, k, v, visible, Terms(dims[0] ** -0.5, softcap=softcap, **vectors))
    memory = batch.pages.transpose(1, 2).contiguous().to(device)  # [N, page, Hkv, D + Dv]
    k_pages, v_pages = memory.transpose(1, 2).split(dims, -1)
    return whole.changed(k=k_pages, v=v_pages, block_table=batch.table.to(device)), whole


def check_appends(dtype: torch.dtype, head_dim: int, device: torch.device | str = "cpu") -> None:
    """Enter keys by the kernel, at once and in pieces, the latter behind keys and values of a cache: the same bits, and
    torch's values; other entries stay.
    """
    from tritonattn.backends import triton

    random, page, kv_heads, lengths = torch.Generator().manual_seed(0), 16, 17, (100, 3, 70)
    keys = [torch.randn(count, kv_heads, head_dim, generator=random).to(device, dtype) for count in lengths]
    keys[0][30, 1], keys[2][5, 2] = torch.nan, 0
    table = torch.randperm(21, generator=random).view(3, 7).int().to(device)
    found = []
    cache = torch.zeros(21, kv_heads, page, 2 * head_dim + RECORD, dtype=dtype, device=device)
    for pieces in ([lengths], [(1, 0, 20), (46, 3, 0), (17, 0, 44), (36, 0, 6)]):
        ours, theirs = (tritonattn.PagedKeyStatistics(21, page, kv_heads, device=device) for _ in range(2))
        ours = key_statistics(cache, head_dim) if len(pieces) > 1 else ours
        held = [0, 0, 0]
        for piece in pieces:
            new = torch.cat([x[at : at + count] for x, at, count in zip(keys, held, piece, strict=True)])
            held = [at + count for at, count in zip(held, piece, strict=True)]
            new = torch.cat([new, torch.full_like(new[:2], torch.nan)])  # of no sequence
            after = torch.tensor(held, device=device)
            triton.append_to_pages(new, offsets(piece).to(device), after, table, ours.buffers)
            with patch.object(paged_statistics, "launches", lambda *_: False):
                theirs.append(new, offsets(piece).to(device), key_lengths=after, block_table=table)
        found.append(ours.buffers)
        torch.testing.assert_close(found[-1], theirs.buffers, rtol=1e-6, atol=0, equal_nan=True)
    for whole, pieced in zip(*found, strict=True):
        assert torch.equal(whole.nan_to_num(-1.0), pieced.nan_to_num(-1.0))
    assert cache[..., : 2 * head_dim].count_nonzero() == 0
