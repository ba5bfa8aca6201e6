"""`attention_decode`: a few new tokens per sequence against a KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ..core.autograd import values_are_read
from ..core.call import LONGEST_QUERY, Request
from ..core.hints import type_of
from ..core.ranges import window_sides
from ..core.terms import Terms
from ..core.visibility import Visibility
from ..scaling import Scaling
from ..scaling.names import ModeName
from .checks import (
    INTEGERS,
    Backend,
    check,
    check_masks,
    check_tensor,
    operands,
)
from .dispatch import refuse_gradients, run
from .dtensors import CACHED, CACHED_PAGES
from .key_statistics import KeyStatistics
from .layouts import CACHE, CACHE_PAGES, Layout
from .paged_statistics import PagedKeyStatistics, check_paged_statistics
from .public import public
from .results import AttentionAux
from .sequence_checks import check_block_table, check_page_numbers, check_record, check_values, descale_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import DecodeOptions


@overload
def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, return_aux: Literal[False] = False, **options: Unpack[DecodeOptions]
) -> Tensor: ...
@overload
def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, return_aux: Literal[True], **options: Unpack[DecodeOptions]
) -> tuple[Tensor, AttentionAux]: ...
@overload
def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, return_aux: bool, **options: Unpack[DecodeOptions]
) -> Tensor | tuple[Tensor, AttentionAux]: ...
@public(CACHED, CACHED_PAGES)
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    key_lengths: Tensor,
    scaling: ModeName | str | Scaling | float | Tensor = "sqrt_dim",
    gain: float | Tensor | None = None,
    statistics: KeyStatistics | PagedKeyStatistics | None = None,
    block_table: Tensor | None = None,
    query_lengths: Tensor | None = None,
    k_descale: float | Tensor | None = None,
    v_descale: float | Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    key_bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    relative_right: int = 0,
    bias_after_softcap: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_aux: bool = False,
    backend: Backend = "auto",
    batch_invariant: bool | None = None,
) -> Tensor | tuple[Tensor, AttentionAux]:
    """Attention of the newest tokens over a KV cache that already holds their keys and values; no gradients.

        position[i] = i + key_lengths[b] - query_lengths[b]        of query row i
        logit[i, j] = gain[i] * factor[i, j] * (q[i] . k[j]) + key_bias[j] + relative[i, j]
        out[i]      = sum_j softmax_j(logit[i, j]) * v[j]          over the keys j <= position[i] of sequence b

    A prefill by `attention(..., causal=True)` followed by calls of this function gives what one full pass gives, for
    every scaling: n, sums and maxima are those of the keys that the row attends to.

    Args:
        q: [B, Hq, Sq, D], the newest 1 to 16 tokens of every sequence (more than one: speculative decoding).
        k_cache: [B, Hkv, capacity, D] in q's dtype, any strides; with block_table pages [N, page, Hkv, D], of any
            page of at least 16 keys. Hkv divides Hq. An 8-bit cache is torch.float8_e4m3fn, as v_cache then is.
        v_cache: Likewise, with Dv.
        key_lengths: Integers [B] on q's device: the keys of every sequence, the new ones included. Where there are
            fewer keys than rows, the first rows attend to nothing.
        scaling, gain: As in `attention`.
        statistics: The `KeyStatistics` kept with the cache, or with pages the `PagedKeyStatistics`, to which the
            new keys have been appended: then no mode reads old keys. Without it the modes that need key norms
            (key_norm_*, cosine, ...) read the visible keys of the cache once more, half of the memory traffic of
            the call itself, and gather pages to do so. A user's Scaling gets k_cache, gathered where it lies in
            pages unless its class says reads_keys = False. The reference follows the formulas and computes all of it
            from the keys.
        block_table: int32 [B, max_pages]: key j of sequence b is in page block_table[b, j // page], at j % page.
        query_lengths: Integers [B]: the new tokens of every sequence, up to Sq, the first of its rows; the other rows
            attend to nothing. None is Sq for all.
        k_descale: Of an 8-bit cache, which holds k / k_descale: a number, or floating, broadcastable to [B, Hkv]; None
            is 1. The logits are those of k_descale * k_cache, and so are the norms of keys that a scaling reads.
            Without statistics, and for a Scaling that reads keys, all of the cache is dequantised for them, in fp32.
        v_descale: Likewise of v_cache; it multiplies the output.
        window: (left, right): row i attends to position[i] - left <= j; no key behind it is visible, whatever right is.
        key_bias: Floating, broadcastable to [B, Hq, capacity] or [B, Hkv, capacity], as in `attention`: of key j of a
            sequence, also where it lies in a page.
        relative_bias: Floating, [B or 1, Hq or 1, Sq or 1, extent]: entry t is added to the logit of the key t
            positions before row i, 0 outside of the extent. relative_right, as in `attention`, moves the entries, of
            which those of later keys have no use here.
        bias_after_softcap, softcap, sinks, return_aux, backend: As in `attention`.
        batch_invariant: As in `attention`. The keys are then not split among programs.

    Entries of the cache behind key_lengths never affect a result, even if NaN, and block_table is not followed there.
    On a GPU key_lengths, block_table and statistics are not read by the host: lengths are clamped to [0, capacity], a
    page outside [0, N) counts as zeros. The launch depends on shapes only, so that a CUDA graph can capture it; the
    keys are split among programs by the capacity, never by the batch. On a CPU values are checked.

    Returns:
        [B, Hq, Sq, Dv] in q's dtype, and with return_aux `AttentionAux`. A row that attends to no key gives zeros.

    Raises:
        TypeError, ValueError: As in `attention`; statistics that lack keys.
        NotImplementedError: A tensor that requires a gradient, while gradients are recorded; an argument that the
            backend asked for cannot honour.

    >>> import torch, tritonattn
    >>> q, k_cache, v_cache = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 32, 8), torch.randn(1, 2, 32, 8)
    >>> statistics = tritonattn.KeyStatistics(batch=1, kv_heads=2, capacity=32)
    >>> statistics.append(k_cache[:, :, :20])
    >>> tritonattn.attention_decode(
    ...     q, k_cache, v_cache, key_lengths=torch.tensor([20]), scaling="key_norm_mean", statistics=statistics
    ... ).shape
    torch.Size([1, 4, 1, 8])

    Sources: Dao et al. 2023, "Flash-Decoding for long-context inference", https://pytorch.org/blog/flash-decoding
    (keys split, then combined); Kwon et al. 2023, "Efficient memory management for large language model serving with
    PagedAttention", arXiv:2309.06180 (pages).
    """
    q, k, v = cache_operands(q, k_cache, v_cache, block_table)
    visible = cache_visibility(q, k, key_lengths, block_table, query_lengths, window, batch_invariant)
    if statistics is not None:
        check_statistics(statistics, q, k, key_lengths, block_table)
    terms = Terms(
        key_bias=key_bias,
        sinks=sinks,
        relative_bias=relative_bias,
        softcap=softcap,
        relative_right=relative_right,
        bias_after_softcap=bias_after_softcap,
    )
    request = Request(
        q,
        k,
        v,
        visible,
        terms,
        block_table=block_table,
        scaling=scaling,
        gain=gain,
        aux=return_aux,
        backend=backend,
        statistics=statistics,
        cached="attention_decode",
        k_descale=None if k_descale is None else descale_of("k_descale", k_descale, q, k, visible),
        v_descale=None if v_descale is None else descale_of("v_descale", v_descale, q, k, visible),
    )
    request = check(request, keys="[B, Hq or Hkv, capacity]")
    given = {**terms.by_name(), "scaling": scaling, "gain": gain, "k_descale": k_descale, "v_descale": v_descale}
    refuse_gradients(request.cached, q=q, k_cache=k, v_cache=v, **given)
    return run(request)


def cache_operands(
    q: Tensor, k: Tensor, v: Tensor, block_table: Tensor | None = None, layout: Layout = CACHE
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k_cache and v_cache of a call, in autocast's dtype where it is on, and pages with heads before keys.

    Raises TypeError or ValueError unless these are the operands of one call.
    """
    if block_table is not None:  # before k_cache, whose axes it decides
        check_tensor("block_table", block_table, "[B, max_pages]", (torch.int32,))
    q, k, v = operands(q, k, v, layout if block_table is None else CACHE_PAGES)
    if not 1 <= q.shape[2] <= LONGEST_QUERY:
        raise ValueError(f"q: expected Sq of 1 to {LONGEST_QUERY}, got {q.shape[2]}; for more rows: attention")
    if block_table is not None:
        check_block_table(block_table, q.shape[0], q)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    if capacity_of(k, block_table) == 0:
        raise ValueError("k_cache: expected a capacity of at least 1 key, got 0")
    return q, k, v


def cache_visibility(
    q: Tensor,
    k: Tensor,
    key_lengths: Tensor,
    block_table: Tensor | None = None,
    query_lengths: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    batch_invariant: bool | None = None,
) -> Visibility:
    """The keys that each row attends to, of `cache_operands`; raises for lengths and pages that do not fit them."""
    invariant = check_masks(True, window, batch_invariant)
    (batch, q_heads, q_len, _), capacity = q.shape, capacity_of(k, block_table)
    check_tensor("key_lengths", key_lengths, "[B]", INTEGERS, q, sizes=(batch,))
    limit = "capacity" if block_table is None else "block_table's max_pages * page"
    check_values("key_lengths", key_lengths, capacity, f"{limit} = ")
    if query_lengths is not None:
        check_tensor("query_lengths", query_lengths, "[B]", INTEGERS, q, sizes=(batch,))
        check_values("query_lengths", query_lengths, q_len, "Sq = ")
    left = None if window is None else window_sides(window)[0]
    if block_table is not None and values_are_read(block_table, key_lengths):
        lengths = key_lengths.long()  # uint8 has no number below 0
        rows = q_len if query_lengths is None else query_lengths.long()
        first = torch.zeros_like(lengths) if left is None else lengths - rows - left
        check_page_numbers(block_table, k.shape[2], k.shape[0], first, lengths, "key_lengths")
    sizes = (batch, q_heads, k.shape[1], q_len, capacity)
    return Visibility.of_padded(sizes, q.device, key_lengths, query_lengths, left=left, invariant=invariant)


def check_statistics(statistics: Any, q: Tensor, k: Tensor, key_lengths: Tensor, block_table: Tensor | None) -> None:
    """Raise unless these are statistics of the keys of `cache_operands`."""
    if isinstance(statistics, PagedKeyStatistics):
        check_paged_statistics(statistics, q, k.transpose(1, 2), block_table)
        return
    if not isinstance(statistics, KeyStatistics):
        raise TypeError(f"statistics: expected a KeyStatistics, got {type_of(statistics)}")
    wanted = (q.shape[0], k.shape[1], capacity_of(k, block_table))
    check_record(statistics.norms, wanted, "[B, Hkv, capacity]", q)
    if values_are_read(statistics.counts, key_lengths):
        missing = statistics.counts < key_lengths
        if missing.any():
            entry = int(missing.nonzero()[0])
            raise ValueError(
                f"statistics: expected all keys of key_lengths, new ones too (append first), got"
                f" {int(statistics.counts[entry])} of {int(key_lengths[entry])} in sequence {entry}"
            )


def capacity_of(k: Tensor, block_table: Tensor | None) -> int:
    """The most keys that a sequence can have: k [B, Hkv, capacity, D], or pages [N, Hkv, page, D]."""
    return k.shape[2] if block_table is None else k.shape[2] * block_table.shape[1]
