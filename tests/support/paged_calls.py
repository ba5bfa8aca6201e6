"""Packed calls whose keys and values lie in pages of shuffled numbers, and the same calls over packed keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import tritonattn
from tests.support.packed import Packed, offsets
from tests.support.pages import WILD
from tritonattn.backends import triton as triton_backend
from tritonattn.calls import paged_statistics
from tritonattn.core.call import AttentionCall, Logits
from tritonattn.core.sequences import Sequences
from tritonattn.core.visibility import Visibility
from tritonattn.integrations.vllm.pages import RECORD, key_statistics


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
    """(call over pages, call over packed keys). lost: a member and its page whose number is wild, and keys are zeros.

    Slots that hold no key are NaN; page numbers behind a member's keys are wild. terms: vectors of the logits.
    """
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    (q_heads, kv_heads), (q_len, k_len) = heads, (packed.q_len, packed.k_len)
    q, k, v = (
        normal(1, q_heads, q_len, dims[0]),
        normal(1, kv_heads, k_len, dims[0]),
        normal(1, kv_heads, k_len, dims[1]),
    )
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    counts = [-(-length // page) for length in packed.k_lengths]
    numbers = torch.randperm(sum(counts) + 2, generator=random)
    memory = torch.full((len(numbers), page, kv_heads, sum(dims)), torch.nan, dtype=dtype, device=device)
    table = torch.tensor(WILD)[torch.arange(max(counts) + 1) % 2].repeat(len(counts), 1)
    taken = 0
    for member, (_, keys) in enumerate(packed.members()):
        for index in range(counts[member]):
            number, start = numbers[taken + index], keys.start + index * page
            stop = min(start + page, keys.stop)
            if lost == (member, index):
                k[:, :, start:stop], v[:, :, start:stop] = 0, 0
            else:
                table[member, index] = number
                memory[number, : stop - start] = torch.cat([k, v], -1)[0, :, start:stop].transpose(0, 1)
        taken += counts[member]
    vectors = {
        "query_scale": normal(1, q_heads, q_len).abs() + 0.5,
        "key_scale": normal(1, kv_heads, k_len),
        "key_bias": normal(1, kv_heads, q_heads // kv_heads, k_len),
        "sinks": normal(q_heads),
    }
    logits = Logits(dims[0] ** -0.5, softcap=softcap, **{name: vectors[name].to(device) for name in terms})
    longest = max(packed.q_lengths), max(packed.k_lengths)
    ends = (offsets(lengths).to(device) for lengths in (packed.q_lengths, packed.k_lengths))
    sequences = Sequences.of(*ends, q_len, k_len, *longest)
    visibility = Visibility.of(q, k, sequences=sequences, **masks)
    whole = AttentionCall(q, k, v, visibility, logits)
    k_pages, v_pages = (x.transpose(1, 2) for x in memory.split(dims, -1))
    return replace(whole, k=k_pages, v=v_pages, block_table=table.to(device, torch.int32)), whole


def check_appends(dtype: torch.dtype, head_dim: int, device: torch.device | str = "cpu") -> None:
    """Enter keys by the kernel, at once and in pieces, the latter behind keys and values of a cache: the same bits, and
    torch's values; other places stay.
    """
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
            triton_backend.append_to_pages(new, offsets(piece).to(device), after, table, ours.buffers)
            with patch.object(paged_statistics, "kernels_take", lambda _: False):
                theirs.append(new, offsets(piece).to(device), key_lengths=after, block_table=table)
        found.append(ours.buffers)
        torch.testing.assert_close(found[-1], theirs.buffers, rtol=1e-6, atol=0, equal_nan=True)
    for whole, pieced in zip(*found, strict=True):
        assert torch.equal(whole.nan_to_num(-1.0), pieced.nan_to_num(-1.0))
    assert cache[..., : 2 * head_dim].count_nonzero() == 0
