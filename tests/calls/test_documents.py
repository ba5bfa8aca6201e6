"""`document_ranges`: the ranges of packed documents, and what calls make of them."""

import pytest
import torch

from tests.support.refusals import refuses
from tritonattn import attention, document_ranges

DOCUMENTS = {
    "ascending": [[0, 0, 0, 1, 1, 2], [4, 4, 4, 4, 4, 4]],
    "any ids, again later": [[7, 7, 2, 7, 7, 7], [1, 2, 1, 2, 2, 1]],
    "padding": [[-1, 3, 3, -1, -1, -1], [0, 0, 0, 0, 0, -100]],
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_run_of_an_id_is_a_document(name):
    documents = torch.tensor(DOCUMENTS[name])
    run = torch.nn.functional.pad((documents.diff(dim=-1) != 0).cumsum(-1), (1, 0))
    mask = (run[:, :, None] == run[:, None, :]) & (documents >= 0)[:, :, None]
    ranges = document_ranges(documents)
    key = torch.arange(6)
    assert ranges.dtype == torch.int32
    assert torch.equal((key >= ranges[..., :1]) & (key < ranges[..., 1:]), mask)

    q, k, v = torch.randn(3, 2, 4, 6, 8).unbind(0)
    options = {"scaling": "key_norm_mean", "causal": True}
    ours, dense = attention(q, k, v, key_ranges=ranges, **options), attention(q, k, v, mask=mask[:, None], **options)
    torch.testing.assert_close(ours, dense)
    assert (ours.transpose(1, 2)[documents < 0] == 0).all()


def test_sizes_dtypes_and_tracing():
    assert document_ranges(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, 2)
    assert document_ranges(torch.zeros(1, 1, dtype=torch.uint8)).tolist() == [[[0, 1]]]
    assert document_ranges(torch.zeros(2, 5, dtype=torch.int32, device="meta")).shape == (2, 5, 2)


def test_refusals():
    refuses("ValueError: documents: expected shape [B, S], got [3]", document_ranges, torch.zeros(3).int())
    refuses("TypeError: documents: expected an integer dtype", document_ranges, torch.zeros(1, 3))
    refuses("TypeError: documents: ", document_ranges, [[0, 1]])
