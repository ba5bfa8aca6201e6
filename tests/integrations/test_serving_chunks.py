"""A served step of layers that attend in chunks, against the chunks of every sequence written out."""

import pytest
import torch

from tests.support.device_work import values_unread
from tritonattn.calls.varlen import Packing
from tritonattn.integrations.serving.layers import Step, key_ends

PAGE, SIZE = 16, 32
NEW = [([1, 1, 1], [1, 33, 64], 3), ([40, 3, 64, 1], [40, 66, 128, 33], 0), ([1, 1, 33, 2, 0], [32, 65, 65, 33, 40], 2)]


def step_of(new: list[int], keys: list[int], decodes: int) -> Step:
    table = torch.randperm(len(new) * 9).int().view(len(new), 9)
    ends, held = key_ends(torch.tensor(new)), key_ends(torch.tensor(keys[decodes:]))
    chunks = Packing(ends[decodes:] - decodes, held, max(new), max(keys), table[decodes:])
    alone = decodes == len(new)
    slots = torch.zeros(sum(new), dtype=torch.int64)
    return Step(sum(new), slots, ends, torch.tensor(keys).int(), table, 1, decodes, None if alone else chunks)


@pytest.mark.parametrize(("new", "keys", "decodes"), NEW)
def test_chunks_of_new_tokens_are_the_sequences(new, keys, decodes):
    step = step_of(new, keys, decodes)
    with values_unread():
        found = step.in_chunks(SIZE, PAGE)
    wanted = []  # rows, keys, pages
    for n, (rows, end) in enumerate(zip(new, keys, strict=True)):
        for first in range((end - rows) // SIZE * SIZE, end, SIZE):
            stop = min(first + SIZE, end)
            pages = step.block_table[n, first // PAGE : -(-stop // PAGE)].tolist()
            wanted.append((stop - max(first, end - rows), stop - first, pages))
    held = [pages[: -(-n // PAGE)] for n, pages in zip(found.lengths.tolist(), found.block_table.tolist(), strict=True)]
    rows = found.new_ends.diff().tolist()
    got = list(zip(rows, found.lengths.tolist(), held, strict=True))
    assert got[: len(wanted)] == wanted
    assert {rest[0] for rest in got[len(wanted) :]} <= {0}
    assert step.in_chunks(SIZE, PAGE) is found
    packing = found.chunks
    if packing is None:
        assert decodes == len(got)
        return
    assert packing.cu_seqlens_q.diff().tolist() == rows[decodes:]
    assert packing.cu_seqlens_k.diff().tolist() == found.lengths[decodes:].tolist()
    assert packing.max_seqlen_q >= max(rows)
    assert packing.max_seqlen_k == SIZE
    assert packing.block_table is not None
    assert torch.equal(packing.block_table, found.block_table[decodes:])
