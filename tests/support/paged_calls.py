"""Packed calls whose keys and values lie in pages of shuffled numbers, and the same calls over packed keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.support.packed import Packed, offsets
from tritonattn.core.call import AttentionCall, Logits
from tritonattn.core.sequences import Sequences
from tritonattn.core.visibility import Visibility

WILD = (-1, 1 << 30)


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
