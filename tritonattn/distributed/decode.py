"""`context_parallel_decode`: the newest tokens against a KV cache whose keys several ranks share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import ops
from ..backends import BACKENDS
from ..calls.checks import INTEGERS, Backend, check_tensor
from ..calls.decode import cache_operands, cache_visibility, check_statistics
from ..calls.dispatch import logits, refuse_gradients, statistics_of, with_terms
from ..calls.dtensors import head_parts
from ..calls.key_statistics import KeyStatistics
from ..calls.layouts import CACHE_OF_RANKS
from ..calls.public import public
from ..calls.results import AttentionAux
from ..calls.sequence_checks import check_values
from ..core.autograd import without_autocast
from ..core.cached_norms import StatisticsOfCache
from ..core.call import ForwardResult, Request
from ..core.invariance import refuse_over_ranks
from ..core.statistics import Statistics
from ..core.terms import Terms
from ..core.visibility import Visibility
from ..scaling import Scaling
from ..scaling.names import ModeName
from . import collectives
from .agreement import require_agreement
from .layout import Split, refuse_dtensors
from .sequence import check_over_ranks, share_with_sinks

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ParallelDecodeOptions(TypedDict, total=False):
    """The keyword arguments of `context_parallel_decode` but for those that it needs, and return_aux."""

    scaling: ModeName | str | Scaling | float | Tensor
    gain: float | Tensor | None
    statistics: KeyStatistics | None
    window: tuple[int | None, int | None] | None
    softcap: float | None
    sinks: Tensor | None
    backend: Backend


@overload
def context_parallel_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    mesh: DeviceMesh,
    key_lengths: Tensor,
    return_aux: Literal[False] = False,
    **options: Unpack[ParallelDecodeOptions],
) -> Tensor: ...
@overload
def context_parallel_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    mesh: DeviceMesh,
    key_lengths: Tensor,
    return_aux: Literal[True],
    **options: Unpack[ParallelDecodeOptions],
) -> tuple[Tensor, AttentionAux]: ...
@overload
def context_parallel_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    mesh: DeviceMesh,
    key_lengths: Tensor,
    return_aux: bool,
    **options: Unpack[ParallelDecodeOptions],
) -> Tensor | tuple[Tensor, AttentionAux]: ...
@public()
def context_parallel_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    mesh: DeviceMesh,
    key_lengths: Tensor,
    scaling: ModeName | str | Scaling | float | Tensor = "sqrt_dim",
    gain: float | Tensor | None = None,
    statistics: KeyStatistics | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_aux: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, AttentionAux]:
    """`attention_decode` over a KV cache whose P equal parts lie on the ranks of a mesh; no gradients.

    Rank r holds the keys r * capacity <= j < (r + 1) * capacity of every sequence. Each rank attends to its part;
    outputs are merged by their lse, and what a scaling counts, sums or maximises is that of the whole sequence.

    Args:
        q: [B, Hq, Sq, D], the newest 1 to 16 tokens of every sequence, the same on all ranks.
        k_cache: [B, Hkv, capacity, D], this rank's part of the cache, in q's dtype.
        v_cache: [B, Hkv, capacity, Dv], likewise.
        mesh: The P ranks: a DeviceMesh of one dimension.
        key_lengths: Integers [B], the keys of every whole sequence, up to P * capacity, the new ones included; the
            same on all ranks. The new key of position p belongs into the part of rank p // capacity.
        scaling, gain: As in `attention_decode`, but for a Scaling that reads keys itself; DTensors as in
            `context_parallel_attention`.
        statistics: The `KeyStatistics` of this rank's part.
        window, softcap, sinks, return_aux: As in `attention_decode`.
        backend: "auto", "triton" or "sdpa".

    Returns:
        [B, Hq, Sq, Dv] on every rank, and with return_aux `AttentionAux`.

    Raises:
        TypeError, ValueError: As `attention_decode`; a mesh of several dimensions; a DTensor as q, cache or lengths;
            on every rank, arguments that differ by rank, in the first call with such shapes and options.
        NotImplementedError: backend "reference", a Scaling that reads keys or has a bias of them, or a tensor that
            requires a gradient.

    >>> import torch, torch.distributed as dist
    >>> from torch.distributed.device_mesh import init_device_mesh
    >>> from tritonattn.distributed import context_parallel_decode
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun starts more
    >>> mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    >>> q, k_cache, v_cache = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 32, 8), torch.randn(1, 2, 32, 8)
    >>> lengths = torch.tensor([20])
    >>> context_parallel_decode(q, k_cache, v_cache, mesh=mesh, key_lengths=lengths, scaling="key_norm_mean").shape
    torch.Size([1, 4, 1, 8])
    >>> dist.destroy_process_group()

    Source: Dao et al. 2023, "Flash-Decoding for long-context inference", https://pytorch.org/blog/flash-decoding.
    """
    scaling, gain, sinks = head_parts(q, scaling=scaling, gain=gain, sinks=sinks)
    refuse_over_ranks(None)
    refuse_dtensors(q=q, k_cache=k_cache, v_cache=v_cache, key_lengths=key_lengths)
    split = Split.of(mesh, "contiguous")
    q, k, v = cache_operands(q, k_cache, v_cache, layout=CACHE_OF_RANKS)
    check_tensor("key_lengths", key_lengths, "[B]", INTEGERS, q)
    capacity = k.shape[2]
    check_values("key_lengths", key_lengths, split.size * capacity, f"{split.size} * capacity = ")
    lengths = (key_lengths.long() - split.rank * capacity).clamp(0, capacity)  # uint8 has no number below 0
    visible = cache_visibility(q, k, lengths, window=window)
    if statistics is not None:
        check_statistics(statistics, q, k, lengths, None)
    terms = Terms(softcap=softcap, sinks=sinks)
    options = {"aux": return_aux, "backend": backend, "cached": "context_parallel_decode"}
    request = check_over_ranks(Request(q, k, v, visible, terms, scaling, gain, **options))
    if request.scaling.reads_keys:
        name = type(request.scaling).__name__
        raise NotImplementedError(f"scaling: expected one that reads no keys itself (reads_keys = False), got {name}")
    refuse_gradients(request.cached, q=q, k_cache=k, v_cache=v, scaling=scaling, gain=gain, sinks=sinks)
    of_cache = {"k_cache": k, "v_cache": v, "key_lengths": key_lengths, "window": window}
    of_logits = {"scaling": scaling, "gain": gain, "softcap": softcap, "sinks": sinks}
    alike = {"q": q, **of_cache, **of_logits, "return_aux": return_aux, "backend": backend}
    require_agreement(split, "context_parallel_decode", **alike)
    sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], split.size * capacity)
    whole = Visibility.of_padded(sizes, q.device, key_lengths, left=visible.left)
    request = request.changed(visibility=Visibility.of_part(whole, split.rank * capacity, capacity))
    with without_autocast(q):
        out, aux = _attend(request, split, statistics, None if visible.left is None else visible.left + 1)
    return (out.to(v.dtype), aux) if return_aux else out.to(v.dtype)


def _attend(
    request: Request, split: Split, statistics: KeyStatistics | None, width: int | None
) -> tuple[Tensor, AttentionAux]:
    """Attend to the keys of all ranks: out, in the dtype of lse, and `AttentionAux`; width is that of a window."""
    backend = BACKENDS[request.backend]
    of_part = statistics_of(request, backend)
    if statistics is not None:
        of_part = StatisticsOfCache(of_part, statistics, None, width)
    terms = logits(request, _SharedRows(of_part, split))
    if terms.key_bias is not None:
        raise NotImplementedError("scaling: expected one without a bias a key, which does not know the whole cache")
    part = with_terms(request, backend, terms._replace(sinks=None))
    out, aux = _merged(ops.attention(part.changed(aux=True, cached=False)), split)
    if terms.sinks is not None:
        out = out * share_with_sinks(aux.lse, terms.sinks)[..., None]
    return out, aux


class _SharedRows(Statistics):
    """Statistics of rows over the keys of all ranks, from those over the keys of this rank, whose norms it has."""

    def __init__(self, of_part: Statistics, split: Split) -> None:
        super().__init__(lambda: of_part.k, of_part.visibility)
        self._of_part = of_part
        self._split = split

    def _norms(self) -> Tensor:
        return self._of_part.norms

    def _norm_sum(self) -> Tensor:
        x = self._of_part.norm_sum
        return collectives.all_gather(x.double(), self._split).sum(0).to(x.dtype)

    def _norm_square_sum(self) -> Tensor:
        return collectives.all_gather(self._of_part.norm_square_sum, self._split).sum(0)

    def _norm_max(self) -> Tensor:
        return collectives.all_gather(self._of_part.norm_max, self._split).amax(0)


def _merged(part: ForwardResult, split: Split) -> tuple[Tensor, AttentionAux]:
    """Rows over the keys of all ranks: out, in the dtype of lse, and `AttentionAux`."""
    rows = torch.stack([x for x in part[1:] if x is not None], -1)
    parts = collectives.all_gather(torch.cat([part.out.to(rows.dtype), rows], -1), split)
    out, (lse, max_logit, entropy) = parts[..., :-3], parts[..., -3:].unbind(-1)
    total = torch.logsumexp(lse, 0)
    shift = total.masked_fill(total == -torch.inf, 0)
    weight = (lse - shift).exp()  # [P, B, Hq, Sq]
    mean = (weight * (lse - entropy).masked_fill(lse == -torch.inf, 0)).sum(0)  # of the logits
    entropy = (shift - mean).clamp(min=0)
    return (weight[..., None] * out).sum(0), AttentionAux(total, max_logit.amax(0), entropy)
