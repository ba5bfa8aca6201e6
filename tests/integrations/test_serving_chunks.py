"""A served step of layers that attend in chunks, against the chunks of every sequence written out."""

import pytest
import torch

from tests.support.device_work import values_unread
from tests.support.served import step_of

PAGE, SIZE = 16, 32
NEW = [([1, 1, 1], [1, 33, 64], 3), ([40, 3, 64, 1], [40, 66, 128, 33], 0), ([1, 1, 33, 2, 0], [32, 65, 65, 33, 40], 2)]


@pytest.mark.parametrize(("new", "keys", "decodes"), NEW)
def test_chunks_of_new_tokens_are_the_sequences(new, keys, decodes):
    step = step_of(new, keys, decodes, torch.randperm(len(new) * 9).int().view(len(new), 9), PAGE)
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
