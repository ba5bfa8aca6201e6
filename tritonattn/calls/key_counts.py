"""`key_counts` and its forms for packed sequences and caches: the number of keys that each row attends to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.autograd import values_are_read
from ..core.hints import type_of
from ..core.statistics import counts_of
from ..core.torch_distributed import refuse_context_parallel
from ..core.visibility import Visibility
from .attention import batch_visibility
from .checks import check_count, check_tensor, operands
from .decode import cache_visibility
from .layouts import BATCHED, CACHE, names_of
from .public import public
from .sequence_checks import check_offsets
from .varlen import Packing, packed_visibility

_LONGEST = torch.iinfo(torch.int32).max  # keys of an axis whose length no argument tells


@public()
def key_counts(
    q: Tensor | Sequence[int],
    k: Tensor | Sequence[int],
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None,
    key_ranges: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """n, the number of keys that each row attends to, for a factor that you multiply into q yourself.

        n[b, h, i] = |{j : causal, window, key_lengths, key_ranges and mask let row i attend to key j}|

    The scalings of `attention` compute with this n. Take whole sequences: of a part of one, n is another.

    Args:
        q: [B, Hq, Sq, D], a tensor of any dtype or its shape (a torch.Size, tuple or list).
        k: [B, Hkv, Sk, D], a tensor or its shape; Hkv divides Hq.
        causal, window, key_lengths, key_ranges, mask: As in `attention`.

    No value of q and k is read. It takes O(B Sq) time and memory, with a mask O(Sq Sk) time for each of the mask's
    batch entries and heads. Values on a GPU are never read by the host, and torch.compile takes it in one graph.

    Returns:
        int64, broadcastable to [B, Hq, Sq], axes of 1 where n is the same: [B or 1, 1 or Hq, Sq]. A row without keys
        has 0. It is on q's device; where q is a shape on that of the first tensor, or torch's default device.

    Raises:
        TypeError, ValueError: As `attention`.
        NotImplementedError: Under torch's context_parallel, where tensors are parts of sequences.

    >>> import torch, tritonattn
    >>> q, k, v = torch.randn(3, 1, 4, 6, 8)
    >>> n = tritonattn.key_counts(q, k, causal=True, window=(3, 0))
    >>> n.tolist()
    [[[1, 2, 3, 4, 4, 4]]]
    >>> scaled = q * n.clamp(min=1).log()[..., None]  # then any attention, with the same window

    Source: Nakanishi 2025, "Scalable-Softmax is superior for attention", arXiv:2501.19399, whose n this is.
    """
    refuse_context_parallel("key_counts")
    device = _device_of(q, k, key_lengths, key_ranges, mask)
    q, k = (_of_shape(name, x, axes, device) for name, x, axes in zip("qk", (q, k), BATCHED.axes, strict=False))
    q, k, _ = operands(q, k, k)
    return _counts(batch_visibility(q, k, causal, window, key_lengths, key_ranges, mask))


@public()
def key_counts_varlen(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    total_q: int | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
) -> Tensor:
    """`key_counts` of the packed sequences of `attention_varlen`.

    Args:
        cu_seqlens_q: int32 [N + 1]: 0, then where each sequence's rows end.
        cu_seqlens_k: int32 [N + 1] of the keys; None is cu_seqlens_q.
        total_q: T_q, the rows of q, q.shape[0]. None is the last offset, on a CPU only: elsewhere, and while compiling,
            offsets are not read.
        causal, window: As in `attention_varlen`.

    Returns:
        int64 [T_q, 1], which broadcasts to [T_q, Hq], on the offsets' device. Rows after the last offset have 0.

    Raises:
        TypeError, ValueError: As `attention_varlen`; no total_q where offsets are not read.
        NotImplementedError: As `key_counts`.

    >>> import torch, tritonattn
    >>> ends = torch.tensor([0, 2, 5], dtype=torch.int32)  # sequences of 2 and 3 tokens
    >>> tritonattn.key_counts_varlen(ends, causal=True).flatten().tolist()
    [1, 2, 1, 2, 3]
    """
    refuse_context_parallel("key_counts_varlen")
    check_offsets("cu_seqlens_q", cu_seqlens_q)
    if total_q is not None:
        check_count("total_q", total_q)
    elif values_are_read(cu_seqlens_q):
        total_q = max(0, int(cu_seqlens_q[-1]))
    else:
        raise ValueError(
            "total_q: expected the number of rows, q.shape[0], got None; offsets are read on a CPU alone, and in no"
            " compiled call"
        )
    packing = Packing(cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, total_q, _LONGEST)
    q = _blank((total_q, 1, 1), cu_seqlens_q.device)
    k = q if cu_seqlens_k is None else _blank((_LONGEST, 1, 1), cu_seqlens_q.device)
    return _counts(packed_visibility(q, k, packing, causal, window, None, None))[0].mT


@public()
def key_counts_decode(
    q: Tensor | Sequence[int],
    *,
    key_lengths: Tensor,
    query_lengths: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
) -> Tensor:
    """`key_counts` of the rows of `attention_decode`: the newest tokens over a KV cache, in one piece or in pages.

        n[b, i] = max(0, i + 1 + key_lengths[b] - query_lengths[b]), and at most left + 1 with a window

    Args:
        q: [B, Hq, Sq, D], a tensor or its shape, with any number of newest tokens.
        key_lengths: Integers [B]: the keys of every sequence, the new ones included.
        query_lengths: Integers [B]: the new tokens of every sequence, the first of its Sq rows; None is Sq for all.
        window: As in `attention_decode`.

    Returns:
        int64 [B, 1, Sq], broadcastable to [B, Hq, Sq]. Rows after query_lengths have 0.

    Raises:
        TypeError, ValueError: As `attention_decode`.
        NotImplementedError: As `key_counts`.

    >>> import torch, tritonattn
    >>> tritonattn.key_counts_decode((2, 8, 1, 64), key_lengths=torch.tensor([8192, 5])).flatten().tolist()
    [8192, 5]
    """
    refuse_context_parallel("key_counts_decode")
    q = _of_shape("q", q, CACHE.axes[0], _device_of(q, key_lengths))
    k = _blank((q.shape[0], 1, _LONGEST, 1), q.device)
    return _counts(cache_visibility(q, k, key_lengths, None, query_lengths, window))


def _counts(visible: Visibility) -> Tensor:
    """The counts as a tensor of the caller's own: `counts_of` shares it."""
    return counts_of(visible).long()


def _device_of(*values: Any) -> torch.device | None:
    """The device of the first tensor; None, which is torch's default, where there is none."""
    for value in values:
        if isinstance(value, Tensor):
            return value.device
    return None


def _of_shape(name: str, x: Any, axes: str, device: torch.device | None) -> Tensor:
    """A blank of x's shape; raises unless x is a tensor, or a shape, of these axes."""
    sizes = x.shape if isinstance(x, Tensor) else x
    if not isinstance(sizes, (tuple, list)):
        raise TypeError(f"{name}: expected a tensor {axes} or its shape, got {type_of(x)}")
    for size in sizes:
        check_count(name, size)
    blank = _blank(sizes, device)
    check_tensor(name, blank, axes, sizes=(None,) * len(names_of(axes)))
    return blank


def _blank(sizes: Sequence[int], device: torch.device | None) -> Tensor:
    """A tensor of one entry in memory, whatever its sizes; in float64, which torch.autocast does not copy."""
    return torch.empty((), dtype=torch.float64, device=device).expand(sizes)
