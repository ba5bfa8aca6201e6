"""`attention_varlen`: sequences of different lengths, packed one after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ..core.autograd import values_are_read
from ..core.call import Request
from ..core.ranges import window_sides
from ..core.sequences import Sequences
from ..core.terms import Terms
from ..core.visibility import Visibility
from ..scaling import Scaling
from ..scaling.names import ModeName
from . import dtensors, layouts
from .checks import Backend, check, check_count, check_masks, check_tensor, operands
from .dispatch import refuse_gradients, run
from .paged_statistics import PagedKeyStatistics, check_paged_statistics
from .public import public
from .results import AttentionAux
from .sequence_checks import check_block_table, check_offset_values, check_offsets, check_page_numbers, descale_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import VarlenOptions


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_aux: Literal[False] = False,
    **options: Unpack[VarlenOptions],
) -> Tensor: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_aux: Literal[True],
    **options: Unpack[VarlenOptions],
) -> tuple[Tensor, AttentionAux]: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_aux: bool,
    **options: Unpack[VarlenOptions],
) -> Tensor | tuple[Tensor, AttentionAux]: ...
@public(dtensors.PACKED, dtensors.PACKED_PAGES)
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scaling: ModeName | str | Scaling | float | Tensor = "sqrt_dim",
    gain: float | Tensor | None = None,
    block_table: Tensor | None = None,
    statistics: PagedKeyStatistics | None = None,
    k_descale: float | Tensor | None = None,
    v_descale: float | Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    key_bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    relative_right: int = 0,
    bias_after_softcap: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_aux: bool = False,
    backend: Backend = "auto",
    batch_invariant: bool | None = None,
) -> Tensor | tuple[Tensor, AttentionAux]:
    """`attention` over sequences of different lengths, packed without padding.

    Sequence n has the rows cu_seqlens_q[n] <= i < cu_seqlens_q[n + 1] and likewise its keys. With i and j counted
    from the sequence's start, Sq and Sk its lengths:

        logit[i, j] = gain[i] * factor[i, j] * (q[i] . k[j]) + key_bias[j] + relative[i, j]
        out[i]      = sum_j softmax_j(logit[i, j]) * v[j]          over the keys j of the sequence visible to row i

    A row attends to no key of another sequence, and a scaling counts and measures only keys of the row's sequence.

    Args:
        q: [T_q, Hq, D], float16, bfloat16, float32 or (not in kernels) float64; any strides.
        k: [T_k, Hkv, D] in q's dtype. Hkv divides Hq: query head h reads key head h // (Hq / Hkv).
        v: [T_k, Hkv, Dv] in q's dtype.
        cu_seqlens_q: int32 [N + 1] on q's device: 0, then where each sequence's rows end, at most T_q. Equal
            neighbours are a sequence without rows.
        cu_seqlens_k: int32 [N + 1] likewise for the keys, at most T_k; with block_table the sums of their numbers.
        max_seqlen_q: At least the rows of the longest sequence; a smaller one is an error, noticed only on a CPU.
        max_seqlen_k: Likewise for the keys.
        scaling: As in `attention`; a tensor broadcasts to [Hq, T_q].
        gain: A float, or a tensor broadcastable to [Hq, T_q] (one per head: [Hq, 1]), which gets a gradient.
        block_table: int32 [N, max_pages]: k and v are a KV cache in pages, k [P, page, Hkv, D] and v [P, page, Hkv, Dv]
            of at least 16 keys per page and any strides. Key j of sequence n is in page block_table[n, j // page], at
            j % page. The cache holds the keys of the rows already. Sequences may share pages. There are no gradients
            and no dropout. Pages may be 8-bit, of torch.float8_e4m3fn, as in `attention_decode`.
        statistics: The `PagedKeyStatistics` kept with such a cache, to which the new keys have been appended: then no
            mode reads old keys. Without it, and for a user's Scaling that reads keys, they are gathered.
        k_descale, v_descale: Of 8-bit pages, as in `attention_decode`: a number, or broadcastable to [N, Hkv].
        causal: Row i attends to the keys j <= i + Sk - Sq.
        window: (left, right): row i attends to i + Sk - Sq - left <= j <= i + Sk - Sq + right; None, -1: no limit.
        key_bias: Floating, broadcastable to [Hq, T_k] or [Hkv, T_k], as in `attention`; with block_table, too, key j of
            sequence n is at cu_seqlens_k[n] + j.
        relative_bias: Floating, [Hq or 1, T_q or 1, extent], with relative_right as in `attention`: a number for every
            distance to the row's position, which is that of `causal` in its sequence.
        sinks: [Hq], or broadcastable to [Hq, T_q], as in `attention`.
        bias_after_softcap, softcap, dropout_p: As in `attention`.
        return_aux: Return (out, `AttentionAux`), its fields [Hq, T_q].
        backend, batch_invariant: As in `attention`.

    Offsets and tables on a GPU are never read by the host: where offsets fall, or pass the end, they are clamped, and
    keys in a page outside [0, P) count as zeros. Entries of pages that hold no key of a sequence never affect it.

    Returns:
        [T_q, Hq, Dv] in q's dtype. Rows after the last offset, and rows without keys, give zeros and no gradient.
        Keys after the last offset reach no result, NaN and inf included. Derivatives are those of
        `attention`.

    Raises:
        TypeError: A type or dtype.
        ValueError: A shape, device, value or name.
        NotImplementedError: An argument that the backend asked for cannot honour; with block_table dropout, or a tensor
            that requires a gradient, while gradients are recorded.
        ImportError: Backend "triton" without triton, or "flash" without a library of attention.

    >>> import torch, tritonattn
    >>> q, k, v = torch.randn(3, 10, 4, 8)
    >>> ends = torch.tensor([0, 3, 10], dtype=torch.int32)  # sequences of 3 and 7 tokens
    >>> tritonattn.attention_varlen(q, k, v, ends, ends, 7, 7, scaling="key_norm_mean", causal=True).shape
    torch.Size([10, 4, 8])

    Source: Dao 2023, arXiv:2307.08691, whose flash_attn_varlen_func has these names and this layout.
    """
    packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table)
    q, k, v = operands(q, k, v, layouts.PACKED if block_table is None else layouts.PAGED)
    visible = packed_visibility(q, k, packing, causal, window, key_bias, batch_invariant)
    if statistics is not None:
        check_paged_statistics(statistics, q, k, block_table)
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    if block_table is None:
        k, v = k[None], v[None]
    terms = Terms(
        key_bias=key_bias,
        sinks=sinks,
        relative_bias=relative_bias,
        softcap=softcap,
        relative_right=relative_right,
        bias_after_softcap=bias_after_softcap,
    )
    request = Request(
        q[None],
        k,
        v,
        visible,
        terms,
        block_table=block_table,
        scaling=scaling,
        gain=gain,
        dropout_p=dropout_p,
        aux=return_aux,
        backend=backend,
        statistics=statistics,
        cached="" if block_table is None else "attention_varlen with a block_table",
        k_descale=None if k_descale is None else descale_of("k_descale", k_descale, q, k, visible),
        v_descale=None if v_descale is None else descale_of("v_descale", v_descale, q, k, visible),
    )
    request = check(request, "[Hq, T_q]", "[Hq or Hkv, T_k]")
    if request.cached:
        given = {**terms.by_name(), "scaling": scaling, "gain": gain, "k_descale": k_descale, "v_descale": v_descale}
        refuse_gradients(request.cached, q=q, k=k, v=v, **given)
    result = run(request)
    if not isinstance(result, tuple):
        return _packed(result)
    out, aux = result
    return _packed(out), type(aux)(*(x if x is None else x[0] for x in aux))


def _packed(out: Tensor) -> Tensor:
    """The packed form [T_q, Hq, Dv] of [1, Hq, T_q, Dv]."""
    return out[0].transpose(0, 1).contiguous()


@dataclass(frozen=True, eq=False)  # Dynamo of torch 2.8 takes no property of a NamedTuple
class Packing:
    """The arguments that say where the sequences lie."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    block_table: Tensor | None = None

    def keys(self, k: Tensor, key_bias: Tensor | None = None) -> int:
        """T_k: the length of k, or with a block table of the axis along which keys in pages k are counted.

        Where offsets are not read, it is an upper bound.
        """
        if self.block_table is None:
            return k.shape[0]
        if isinstance(key_bias, Tensor) and key_bias.dim() > 0 and key_bias.shape[-1] != 1:
            return key_bias.shape[-1]
        if values_are_read(self.cu_seqlens_k):
            return int(self.cu_seqlens_k[-1])
        return (self.cu_seqlens_k.shape[0] - 1) * self._longest_k(k)

    def visibility(self, q: Tensor, k: Tensor, k_len: int, **masks: Any) -> Visibility:
        """The `keys` to which each row attends, by checked arguments: q [T_q, Hq, D] and k, packed or in pages."""
        q_len, longest_k = q.shape[0], min(self._longest_k(k), k_len)
        longest_q = min(self.max_seqlen_q, q_len)
        sequences = Sequences.of(self.cu_seqlens_q, self.cu_seqlens_k, q_len, k_len, longest_q, longest_k)
        q_shape, k_shape = torch.Size((1, q.shape[1], q_len, 0)), torch.Size((1, k.shape[-2], k_len, 0))
        return Visibility.of_shapes(q_shape, k_shape, q.device, sequences=sequences, **masks)

    def _longest_k(self, k: Tensor) -> int:
        """An upper bound on the keys of the longest sequence, at most what the pages k of a table hold."""
        if self.block_table is None:
            return self.max_seqlen_k
        return min(self.max_seqlen_k, self.block_table.shape[1] * k.shape[1])


def packed_visibility(
    q: Tensor,
    k: Tensor,
    packing: Packing,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    key_bias: Tensor | None,
    batch_invariant: bool | None,
) -> Visibility:
    """The keys visible to each row, of checked q [T_q, Hq, D] and k, packed or in pages; raises for masks that misfit.

    key_bias   says how many keys there are, where they lie in pages
    """
    invariant = check_masks(causal, window, batch_invariant)
    q_offsets, k_offsets = packing.cu_seqlens_q, packing.cu_seqlens_k
    check_offsets("cu_seqlens_q", q_offsets, q)
    check_tensor("cu_seqlens_k", k_offsets, "[N + 1]", (torch.int32,), q, sizes=q_offsets.shape)
    check_count("max_seqlen_q", packing.max_seqlen_q)
    check_count("max_seqlen_k", packing.max_seqlen_k)
    if packing.block_table is not None:
        check_block_table(packing.block_table, q_offsets.shape[0] - 1, q)
    k_len = packing.keys(k, key_bias)
    check_offset_values("cu_seqlens_q", q_offsets, q.shape[0], "T_q", packing.max_seqlen_q)
    check_offset_values("cu_seqlens_k", k_offsets, k_len, "T_k", packing.max_seqlen_k)
    if packing.block_table is not None:
        _check_pages(packing, packing.block_table, k, window)
    return packing.visibility(q, k, k_len, causal=causal, window=window, invariant=invariant)


def _check_pages(packing: Packing, table: Tensor, k: Tensor, window: tuple[int | None, int | None] | None) -> None:
    """Check that sequences fit into the table, and the pages that rows read."""
    if not values_are_read(packing.cu_seqlens_q, packing.cu_seqlens_k):
        return
    rows, keys = packing.cu_seqlens_q.diff().long(), packing.cu_seqlens_k.diff().long()
    page, capacity = k.shape[1], table.shape[1] * k.shape[1]
    if keys.numel() and int(keys.max()) > capacity:
        raise ValueError(
            f"cu_seqlens_k: expected at most block_table's max_pages * page = {capacity} keys a sequence,"
            f" got {int(keys.max())}"
        )
    if not values_are_read(table):
        return
    left, _ = window_sides(window)
    first = torch.zeros_like(keys) if left is None else keys - rows - left
    check_page_numbers(table, page, k.shape[0], first, torch.where(rows > 0, keys, 0), "cu_seqlens_k")
