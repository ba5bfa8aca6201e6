"""`attention_decode`: a few new tokens a sequence against a KV cache."""

from __future__ import annotations

from torch import Tensor

from ..core.call import AttentionCall, Logits
from ..scaling import Scaling
from .checks import check
from .decode_checks import cache_operands, cache_visibility, check_statistics
from .dispatch import AttentionAux, refuse_gradients, run
from .key_statistics import KeyStatistics
from .paged_statistics import PagedKeyStatistics
from .public import public
from .sharded import CACHED, CACHED_PAGES


@public(CACHED, CACHED_PAGES)
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    key_lengths: Tensor,
    scaling: str | Scaling | float | Tensor = "sqrt_dim",
    gain: float | Tensor | None = None,
    statistics: KeyStatistics | PagedKeyStatistics | None = None,
    block_table: Tensor | None = None,
    query_lengths: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    key_bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    relative_right: int = 0,
    bias_after_softcap: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_aux: bool = False,
    backend: str = "auto",
    batch_invariant: bool | None = None,
) -> Tensor | tuple[Tensor, AttentionAux]:
    """Attention of the newest tokens over a KV cache that already holds their keys and values; no gradients.

        own[i]      = i + key_lengths[b] - query_lengths[b]        the position of query row i
        logit[i, j] = gain[i] * factor[i, j] * (q[i] . k[j]) + key_bias[j] + relative[i, j]
        out[i]      = sum_j softmax_j(logit[i, j]) * v[j]          over the keys j <= own[i] of sequence b

    A prefill by `attention(..., causal=True)` followed by calls of this function gives what one full pass gives, for
    every scaling: n, sums and maxima are those of the keys that the row attends to.

    Args:
        q: [B, Hq, Sq, D], the newest 1 to 16 tokens of every sequence (more than one: speculative decoding).
        k_cache: [B, Hkv, capacity, D] in q's dtype, any strides; with block_table pages [N, page, Hkv, D], of any
            page of at least 16 keys. Hkv divides Hq.
        v_cache: Likewise, with Dv.
        key_lengths: Integers [B] on q's device: the keys of every sequence, the new ones included. Where there are
            fewer keys than rows, the first rows attend to nothing.
        scaling, gain: As in `attention`.
        statistics: The `KeyStatistics` kept with the cache, or with pages the `PagedKeyStatistics`, to which the
            new keys have been appended: then no mode reads old keys. Without it the modes that need key norms
            (key_norm_*, cosine, inkling2) read the visible keys of the cache once more, half of the memory traffic of
            the call itself, and gather pages to do so. A Scaling of your own gets k_cache, gathered where it lies in
            pages unless its class says reads_keys = False. The reference follows the formulas and computes all of it
            from the keys.
        block_table: int32 [B, max_pages]: key j of sequence b is in page block_table[b, j // page], at j % page.
        query_lengths: Integers [B]: the new tokens of every sequence, up to Sq, the first of its rows; the other rows
            attend to nothing. None is Sq for all.
        window: (left, right): row i attends to own[i] - left <= j; no key behind own[i] is visible, whatever right is.
        key_bias: Floating, broadcastable to [B, Hq, capacity] or [B, Hkv, capacity], as in `attention`: of key j of a
            sequence, also where it lies in a page.
        relative_bias: Floating, [B or 1, Hq or 1, Sq or 1, extent]: entry t is added to the logit of the key t
            positions before own[i], 0 outside of the extent. relative_right, as in `attention`, moves the entries, of
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
    terms = Logits(1.0, None, None, key_bias, softcap, sinks, None, relative_bias, relative_right, bias_after_softcap)
    call = AttentionCall(
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
        record=statistics,
        cached="attention_decode",
    )
    check(call, keys="[B, Hq or Hkv, capacity]")
    given = {"key_bias": key_bias, "relative_bias": relative_bias, "sinks": sinks, "scaling": scaling, "gain": gain}
    refuse_gradients(call.cached, q=q, k_cache=k, v_cache=v, **given)
    return run(call)
