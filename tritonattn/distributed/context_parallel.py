"""`context_parallel_attention`: one sequence, whose tokens several ranks share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..backends import BACKENDS
from ..calls.attention import batch_visibility
from ..calls.checks import FLOATS, Backend, check_count, operands
from ..calls.dispatch import with_terms
from ..calls.dtensors import head_parts
from ..calls.public import public
from ..calls.results import AttentionAux, aux_of
from ..calls.sequence_checks import check_offset_values, check_offsets
from ..core.autograd import needs_graph, without_autocast
from ..core.call import Request
from ..core.invariance import refuse_over_ranks
from ..core.terms import Terms
from ..scaling import Scaling
from ..scaling.names import ModeName
from . import by_heads, gathered, ring
from .agreement import require_agreement
from .layout import Split, refuse_dtensors
from .sequence import SharedCall, SharedSequence, check_over_ranks, logits_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

_METHODS = {"allgather": gathered.attention, "alltoall": by_heads.attention, "ring": ring.attention}


class ParallelOptions(TypedDict, total=False):
    """The keyword arguments of `context_parallel_attention` but for mesh, which it needs, and return_aux."""

    method: str
    layout: str
    scaling: ModeName | str | Scaling | float | Tensor
    gain: float | Tensor | None
    key_bias: Tensor | None
    causal: bool
    window: tuple[int | None, int | None] | None
    cu_seqlens: Tensor | None
    softcap: float | None
    sinks: Tensor | None
    backend: Backend
    reduce_dtype: torch.dtype
    head_group: int | None


@overload
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh,
    return_aux: Literal[False] = False,
    **options: Unpack[ParallelOptions],
) -> Tensor: ...
@overload
def context_parallel_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mesh: DeviceMesh, return_aux: Literal[True], **options: Unpack[ParallelOptions]
) -> tuple[Tensor, AttentionAux]: ...
@overload
def context_parallel_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mesh: DeviceMesh, return_aux: bool, **options: Unpack[ParallelOptions]
) -> Tensor | tuple[Tensor, AttentionAux]: ...
@public()
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh,
    method: str = "allgather",
    layout: str = "contiguous",
    scaling: ModeName | str | Scaling | float | Tensor = "sqrt_dim",
    gain: float | Tensor | None = None,
    key_bias: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    cu_seqlens: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_aux: bool = False,
    backend: Backend = "auto",
    reduce_dtype: torch.dtype = torch.float32,
    head_group: int | None = None,
) -> Tensor | tuple[Tensor, AttentionAux]:
    """`attention` over a sequence whose tokens are shared by the P ranks of a mesh.

    The result is that of `attention` on the whole sequence of S tokens, cut as `shard` cuts it; what a scaling counts,
    sums or maximises is that of the whole sequence.

    Args:
        q: [B, Hq, S / P, D], this rank's part of the queries, of one shape on all ranks; dtypes as in `attention`.
        k: [B, Hkv, S / P, D], its part of the keys.
        v: [B, Hkv, S / P, Dv], its part of the values.
        mesh: The P ranks: a DeviceMesh of one dimension, as mesh["cp"].
        method: "allgather" gathers keys and values. "alltoall" exchanges tokens for heads: each rank attends to the
            whole sequence with Hq / P heads (P divides Hq). "ring" passes keys and values round, and holds two parts
            of them at a time.
        layout: How `shard` cut the sequence: "contiguous", or "zigzag", the same work for all ranks under causal.
        scaling: As in `attention`, parameters of all heads included; a tensor is that of this rank's rows.
        gain: As in `attention`, for this rank's rows.
        key_bias: As in `attention`, for this rank's keys; its gradient is whole, as that of k is.
        causal, window: As in `attention`, of positions in the whole sequence.
        cu_seqlens: int32 [N + 1]: where documents begin and end in the whole sequence, the same on every rank and for
            every batch entry. A row attends to its document only. Documents may cross the parts of ranks.
        sinks: As in `attention`; those of rows are of this rank's.
        softcap, return_aux: As in `attention`.
        backend: "auto", "triton" or "sdpa", as in `attention`.
        reduce_dtype: The dtype in which gradients of keys and values are sent and added over ranks.
        head_group: Key heads whose keys and values are gathered at a time, in "allgather"; None is all of them.
            Fewer take less memory and more messages.

    Every rank calls with the same arguments but for q, k, v and what belongs to their rows. The gradient of a parameter
    (gain, sinks, a learned scaling) is the part of this rank's rows: sum it over ranks, as FSDP and DDP do. Under
    tensor parallelism q, k and v are plain tensors of this rank's heads, and a gain, sinks or a scaling that is a
    DTensor (`HeadParallel`) stands for its values of these heads.

    Returns:
        [B, Hq, S / P, Dv]; with return_aux also the rows' `AttentionAux`. At one P repetitions give the same bits.

    Raises:
        TypeError, ValueError: As `attention`; a mesh, method or layout; heads that P does not divide; a DTensor as
            q, k, v or key_bias; on every rank, arguments that differ by rank, in the first call with such shapes and
            options.
        NotImplementedError: backend "reference".

    >>> import torch, torch.distributed as dist
    >>> from torch.distributed.device_mesh import init_device_mesh
    >>> from tritonattn.distributed import context_parallel_attention, shard
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun starts more
    >>> mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    >>> q, k, v = (shard(torch.randn(1, 4, 16, 8), mesh=mesh, layout="zigzag") for _ in range(3))
    >>> options = {"scaling": "key_norm_mean", "causal": True, "layout": "zigzag"}
    >>> context_parallel_attention(q, k, v, mesh=mesh, **options).shape
    torch.Size([1, 4, 16, 8])
    >>> dist.destroy_process_group()

    Sources: Llama Team 2024, arXiv:2407.21783, 3.3.2 (all-gather, zig-zag); Jacobs et al. 2023, arXiv:2309.14509
    (all-to-all); Liu et al. 2023, arXiv:2310.01889 (ring).
    """
    scaling, gain, sinks = head_parts(q, scaling=scaling, gain=gain, sinks=sinks)
    refuse_over_ranks(None)
    refuse_dtensors(q=q, k=k, v=v, key_bias=key_bias)
    q, k, v = operands(q, k, v)
    visible = batch_visibility(q, k, causal, window)  # of this rank's tokens, and only for its sizes
    terms = Terms(key_bias=key_bias, softcap=softcap, sinks=sinks)
    request = Request(q, k, v, visible, terms, scaling, gain, aux=return_aux, backend=backend)
    request = check_over_ranks(request, "[B, Hq, S / P]")
    split = Split.of(mesh, layout)
    _check(q, k, split, method, cu_seqlens, reduce_dtype, head_group)
    of_masks = {"causal": causal, "window": window, "cu_seqlens": cu_seqlens}
    of_logits = {"scaling": scaling, "gain": gain, "key_bias": key_bias, "softcap": softcap, "sinks": sinks}
    of_results = {"return_aux": return_aux, "backend": backend}
    of_ranks = {"method": method, "layout": layout, "reduce_dtype": reduce_dtype, "head_group": head_group}
    alike = {"q": q, "k": k, "v": v, **of_masks, **of_logits, **of_results, **of_ranks}
    require_agreement(split, "context_parallel_attention", **alike)
    with without_autocast(q):
        keep_rounding = v.dtype.itemsize == 2 and needs_graph(q, k, v)
        if keep_rounding:  # gradients of logits and of norms add up before they are rounded
            request = request.changed(q=q.float(), k=k.float())
        sequence = SharedSequence.of(q, k, split, causal, window, cu_seqlens)
        call = with_terms(request, BACKENDS[request.backend], logits_of(request, sequence, reduce_dtype))
        heads = k.shape[1] if head_group is None else head_group
        numbers = call.terms.without_tensors()
        shared = SharedCall(sequence, numbers, call.backend, heads, reduce_dtype, return_aux, keep_rounding)
        result = _METHODS[method](call, shared)
    return (result.out, aux_of(result)) if return_aux else result.out


def _check(
    q: Tensor, k: Tensor, split: Split, method: Any, cu_seqlens: Any, reduce_dtype: Any, head_group: Any
) -> None:
    if method not in _METHODS:
        raise ValueError(f"method: expected one of {', '.join(_METHODS)}, got {method!r}")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"k: expected q's {q.shape[2]} tokens of this rank, got {k.shape[2]}")
    split.check("q", q.shape[2])
    if method == "alltoall" and q.shape[1] % split.size:
        raise ValueError(
            f"q: expected a number of heads that the {split.size} ranks divide for method 'alltoall', got {q.shape[1]}"
        )
    if cu_seqlens is not None:
        check_offsets("cu_seqlens", cu_seqlens, q)
        check_offset_values("cu_seqlens", cu_seqlens, q.shape[2] * split.size, "S")
    if reduce_dtype not in FLOATS:
        raise TypeError(f"reduce_dtype: expected one of {', '.join(map(str, FLOATS))}, got {reduce_dtype!r}")
    if head_group is not None:
        check_count("head_group", head_group, 1)
