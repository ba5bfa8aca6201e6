"""`document_ranges`: the keys of every row where documents are packed into rows of one length."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import INTEGERS, check_tensor


def document_ranges(documents: Tensor) -> Tensor:
    """The `key_ranges` of documents that share rows of one length: each token attends to its document.

        key_ranges[b, i] = (lo, hi), the run of equal ids documents[b, lo:hi] in which i lies

    `causal` and `window` narrow them. It takes O(B S) memory, and reads no value on the host.

    Args:
        documents: Integers [B, S], the document of every token. Each run of equal ids is one document. An id that comes
            again, as in [[0, 1, 0]], begins another: a document in several runs needs a `mask`. A negative id is
            padding, whose rows attend to nothing and have the output 0.

    Returns:
        int32 [B, S, 2].

    Raises:
        TypeError, ValueError: Another type, dtype or shape.

    >>> import torch, tritonattn
    >>> ranges = tritonattn.document_ranges(torch.tensor([[0, 0, 0, 1, 1, -1]]))
    >>> ranges[0].tolist()
    [[0, 3], [0, 3], [0, 3], [3, 5], [3, 5], [5, 5]]
    >>> q, k, v = torch.randn(3, 1, 4, 6, 8)
    >>> out = tritonattn.attention(q, k, v, causal=True, key_ranges=ranges)
    """
    check_tensor("documents", documents, "[B, S]", INTEGERS, sizes=(None, None))
    batch, length = documents.shape
    position = torch.arange(length, device=documents.device, dtype=torch.int32)
    edge = torch.ones(batch, 1, dtype=torch.bool, device=documents.device)
    change = documents[:, 1:] != documents[:, :-1]  # [B, S - 1]
    begins, ends = (torch.cat(parts, -1)[:, :length] for parts in ([edge, change], [change, edge]))
    lo = torch.where(begins, position, 0).cummax(-1).values
    hi = torch.where(ends, position + 1, length).flip(-1).cummin(-1).values.flip(-1)
    return torch.stack([lo, torch.where(documents < 0, lo, hi)], dim=-1).int()
