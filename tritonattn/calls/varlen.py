"""`attention_varlen`: sequences of their own lengths, packed one after another."""

from __future__ import annotations

from torch import Tensor

from ..core.sequences import Sequences
from ..core.visibility import Visibility
from ..scaling import Scaling
from .checks import Options
from .dispatch import AttentionAux, attend, autocast
from .factor import Factor
from .sharded import PACKED, takes_shards
from .varlen_checks import Packing, check_varlen
from .words import with_hints


@with_hints
@takes_shards(PACKED)
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scaling: str | Scaling | float | Tensor = "sqrt_dim",
    gain: float | Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    key_bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_aux: bool = False,
    backend: str = "auto",
    batch_invariant: bool | None = None,
) -> Tensor | tuple[Tensor, AttentionAux]:
    """`attention` over sequences of their own lengths, packed without padding.

    Sequence n has the rows cu_seqlens_q[n] <= i < cu_seqlens_q[n + 1] and likewise its keys. With i and j counted
    from the sequence's own start, Sq and Sk its own lengths:

        logit[i, j] = gain[i] * factor[i, j] * (q[i] . k[j]) + key_bias[j]
        out[i]      = sum_j softmax_j(logit[i, j]) * v[j]          over the keys j of the sequence visible to row i

    A row sees no key of another sequence, and what a scaling counts, sums or maximises over visible keys is that of
    the row's own sequence.

    Args:
        q: [T_q, Hq, D], float16, bfloat16, float32 or (not in kernels) float64; any strides.
        k: [T_k, Hkv, D] in q's dtype. Hkv divides Hq: query head h reads key head h // (Hq / Hkv).
        v: [T_k, Hkv, Dv] in q's dtype.
        cu_seqlens_q: int32 [N + 1] on q's device: 0, then where each sequence's rows end, at most T_q. Equal
            neighbours are a sequence without rows.
        cu_seqlens_k: int32 [N + 1] likewise for the keys, at most T_k.
        max_seqlen_q: At least the rows of the longest sequence; a smaller one is an error, seen only on a CPU.
        max_seqlen_k: Likewise for the keys.
        scaling: As in `attention`; a tensor broadcasts to [Hq, T_q].
        gain: A float, or a tensor broadcastable to [Hq, T_q] (one a head: [Hq, 1]), which gets a gradient.
        causal: Row i sees the keys j <= i + Sk - Sq.
        window: (left, right): row i sees i + Sk - Sq - left <= j <= i + Sk - Sq + right; None, -1: no limit.
        key_bias: Floating, broadcastable to [Hq, T_k] or [Hkv, T_k], as in `attention`.
        softcap, sinks, dropout_p, backend, batch_invariant: As in `attention`.
            return_aux: Return (out, `AttentionAux`), its fields [Hq, T_q].

    Offsets on a GPU are never read by the host: where they fall, or pass the end, they are clamped.

    Returns:
        [T_q, Hq, Dv] in q's dtype. Rows after the last offset, and rows that see no key, give zeros and no gradient.
        Keys after the last offset reach no result, NaN and inf included. Gradients are of first order.

    Raises:
        TypeError: A type or dtype.
        ValueError: A shape, device, value or name.
        NotImplementedError: An argument that the backend asked for cannot honour.
        ImportError: Backend "triton" without triton.

    >>> import torch, tritonattn
    >>> q, k, v = torch.randn(3, 10, 4, 8)
    >>> ends = torch.tensor([0, 3, 10], dtype=torch.int32)  # sequences of 3 and 7 tokens
    >>> tritonattn.attention_varlen(q, k, v, ends, ends, 7, 7, scaling="key_norm_mean", causal=True).shape
    torch.Size([10, 4, 8])

    Source: Dao 2023, arXiv:2307.08691, whose flash_attn_varlen_func has these names and this layout.
    """
    options = Options(
        causal=causal,
        window=window,
        key_bias=key_bias,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
        return_aux=return_aux,
        backend=backend,
        batch_invariant=batch_invariant,
    )
    packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    (q, k, v), autocast_off = autocast(q, k, v)
    check_varlen(q, k, v, packing, options)
    (q_len, q_heads, _), k_len = q.shape, k.shape[0]
    factor = Factor.of(scaling, gain, q, (q_heads, q_len), "[Hq, T_q]")
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    longest = min(max_seqlen_q, q_len), min(max_seqlen_k, k_len)
    sequences = Sequences.of(cu_seqlens_q, cu_seqlens_k, q_len, k_len, *longest)
    visibility = Visibility.of(q, k, causal=causal, window=window, sequences=sequences, invariant=options.invariant)
    with autocast_off:
        result = attend(q, k, v, factor, visibility, options)
    if not isinstance(result, tuple):
        return _packed(result)
    out, aux = result
    return _packed(out), AttentionAux(*(x[0] for x in aux))


def _packed(out: Tensor) -> Tensor:
    """[1, Hq, T_q, Dv] as [T_q, Hq, Dv]."""
    return out[0].transpose(0, 1).contiguous()
