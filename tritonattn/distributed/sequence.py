"""A sequence that ranks share, and the vectors of a scaling for this rank's rows, as one process computes them.

Ranks send totals of key statistics, not keys: chunk c of a causal sequence adds the totals of all earlier chunks to
its prefix sums, C numbers per head. Gradients go the other way: a key takes the sum of the rows behind it, those of
later chunks by their totals. Where rows attend to other ranges, the norms themselves are gathered, 4 bytes per key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..backends import choose
from ..calls.checks import check
from ..calls.dispatch import logits
from ..core.autograd import in_forward_mode
from ..core.call import Request
from ..core.norms import key_norms_of
from ..core.ranges import argmax_of_prefixes, prefix_sum
from ..core.sequences import Sequences
from ..core.statistics import Statistics, at_first_use
from ..core.terms import Terms, given
from ..core.visibility import Visibility
from ..scaling.base import reads_distances
from . import collectives
from .layout import Split


@dataclass(frozen=True, eq=False)
class SharedSequence:
    """A sequence of S tokens, split over ranks, and the keys that this rank's rows attend to.

    whole        of all S rows, as one process would compute it
    visibility   of this rank's rows among all S keys
    """

    split: Split
    whole: Visibility
    visibility: Visibility

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        split: Split,
        causal: bool,
        window: tuple[int | None, int | None] | None,
        cu_seqlens: Tensor | None,
    ) -> SharedSequence:
        """The sequence of this rank's q [B, Hq, S / P, D] and k [B, Hkv, S / P, D], and the masks of the whole."""
        q_shape, k_shape = (torch.Size((*x.shape[:2], x.shape[2] * split.size, x.shape[3])) for x in (q, k))
        length = q_shape[2]
        documents = None
        if cu_seqlens is not None:
            documents = Sequences.of(cu_seqlens, cu_seqlens, length, length, length, length)
        whole = Visibility.of_shapes(q_shape, k_shape, q.device, causal=causal, window=window, sequences=documents)
        ranges = None
        if not whole.is_full:
            positions = split.positions(q.shape[2], q.device)
            ranges = torch.stack([bound[:, positions] for bound in whole.ranges()], -1).expand(q.shape[0], -1, -1)
        return cls(split, whole, Visibility.of_shapes(q.shape, k_shape, q.device, key_ranges=ranges))

    @property
    def length(self) -> int:
        return self.whole.k_len

    @property
    def ends_at_rows(self) -> bool:
        """True where no row attends to a key after its position."""
        return self.whole.right == 0

    def of_all_rows(self, q: Tensor, k: Tensor) -> Visibility:
        """`whole`, of some heads: q [B, H, S, D] and k."""
        if self.whole.sequences is None:
            return Visibility.of(q, k, window=(self.whole.left, self.whole.right))
        return Visibility.of(q, k, key_ranges=torch.stack(self.whole.ranges(), -1).expand(q.shape[0], -1, -1))


class SharedCall(NamedTuple):
    """A call's arguments that are not tensors.

    numbers the terms of its logits, without tensors
    heads   key heads whose keys and values are gathered at a time
    """

    sequence: SharedSequence
    numbers: Terms
    backend: str
    heads: int
    reduce_dtype: torch.dtype
    aux: bool
    keep_rounding: bool


def logits_of(request: Request, sequence: SharedSequence, reduce_dtype: torch.dtype) -> Terms:
    """The terms of a request's logits, those of rows of this rank, those of keys of all; differentiable.

    key_bias, of this rank's keys, is gathered and added to the scaling's bias. A scaling that reads keys itself
    (`Scaling.reads_keys`) gets all of them, gathered.
    """
    k, terms, split, visible = request.k, request.terms, sequence.split, sequence.visibility
    if request.scaling.reads_keys:
        whole = collectives.gather(k, split, 2, torch.promote_types(reduce_dtype, k.dtype))
        statistics = Statistics(whole, visible)
    else:
        whole = k.detach()[:, :, :1].expand(-1, -1, sequence.length, -1)  # a shape; its values are not read
        by_totals = sequence.length > 0 and (sequence.whole.is_full or sequence.whole.is_square_causal)
        statistics = SharedStatistics(k, visible, split, by_totals)
    if (key_bias := terms.key_bias) is not None:
        of_rank = key_bias.expand((*key_bias.shape[:-1], k.shape[2]))
        key_bias = collectives.gather(of_rank, split, -1, torch.promote_types(reduce_dtype, of_rank.dtype))
        terms = terms.changed(key_bias=key_bias)
    request = request.changed(visibility=visible, terms=terms)
    return logits(request, statistics, whole, split.positions(k.shape[2], k.device)[None])


_OVER_RANKS = ("key_bias", "sinks", "softcap")  # and a scaling's factors


def check_over_ranks(request: Request, rows: str = "[B, Hq, Sq]") -> Request:
    """Check a request and choose its backend.

    Raises NotImplementedError for what ranks with rows from anywhere lack.
    """
    if in_forward_mode():
        raise NotImplementedError("forward mode (jvp): not supported over ranks; `attention` has it on one")
    request = check(request, rows)
    if reads_distances(request.scaling, request.q):
        name = type(request.scaling).__name__
        raise NotImplementedError(f"scaling: expected one without a factor or bias of distances over ranks, got {name}")
    if (other := next((name for name in given(request.terms) if name not in _OVER_RANKS), None)) is not None:
        raise NotImplementedError(f"{other}: not supported over ranks")
    if request.scaling.after_softcap and request.terms.softcap is not None:
        raise NotImplementedError("softcap: not supported over ranks with a scaling that acts behind it")
    backend = choose(request).name
    if backend in ("flash", "reference"):
        raise NotImplementedError(f"backend: expected 'auto', 'triton' or 'sdpa' over ranks, got {backend!r}")
    return request.changed(backend=backend)


def share_with_sinks(lse: Tensor, sinks: Tensor) -> Tensor:
    """The weight of keys with sinks [B, Hq, Sq]: exp(lse) / (exp(lse) + exp(sinks)), 0 for a row without keys."""
    return torch.sigmoid(lse - sinks).masked_fill(lse == -torch.inf, 0)


class SharedStatistics(Statistics):
    """`Statistics` of this rank's rows and of all keys, from the keys k [B, Hkv, S / P, D] that this rank holds.

    by_totals   row i of the sequence attends to the keys j <= i, or, where no row's range ends early, all of them
    """

    def __init__(self, k: Tensor, visibility: Visibility, split: Split, by_totals: bool) -> None:
        super().__init__(k, visibility)
        self._split = split
        self._by_totals = by_totals

    _local = at_first_use("norms_of_rank")

    def _norms_of_rank(self) -> Tensor:
        """Norms of this rank's keys: [B, Hkv, S / P]. The row of a key attends to it at least."""
        return key_norms_of(self.k)

    def _norms(self) -> Tensor:
        return collectives.gather(self._local, self._split, 2)

    def _norm_sum(self) -> Tensor:
        return self._total(self._local).to(self._local.dtype) if self._by_totals else super()._norm_sum()

    def _norm_square_sum(self) -> Tensor:
        return self._total(self._local.double().square()) if self._by_totals else super()._norm_square_sum()

    def _total(self, x: Tensor) -> Tensor:
        if not self.visibility.is_full:
            return running_sum(x, self._split)
        sums = in_chunks(x.double(), self._split).sum(-1)  # [B, Hkv, chunks of this rank]
        total = collectives.gather(sums, self._split, -1).sum(-1, keepdim=True)
        return total.expand(*x.shape[:2], self.visibility.q_len)

    def _norm_max(self) -> Tensor:
        if not self._by_totals:
            return super()._norm_max()
        split, x = self._split, in_chunks(self._local.double(), self._split)  # [B, Hkv, chunks of this rank, n]
        local = x.gather(-1, argmax_of_prefixes(x.detach()))  # the lowest of equal keys takes the gradient
        of_chunks = collectives.gather(local[..., -1], split, -1)  # [B, Hkv, chunks]
        best = of_chunks.gather(-1, argmax_of_prefixes(of_chunks.detach()))
        if self.visibility.is_full:
            return best[..., -1:].expand(*best.shape[:2], self.visibility.q_len).to(self._local.dtype)
        before = pad(best, (1, -1), value=-torch.inf)[..., split.chunks(), None]  # of earlier chunks
        return torch.where(before >= local, before, local).flatten(-2).to(self._local.dtype)


def running_sum(x: Tensor, split: Split) -> Tensor:
    """Sums of x [..., S / P] over j <= i of the whole sequence: fp64 [..., S / P]."""
    sums = prefix_sum(in_chunks(x, split))  # [..., chunks of this rank, n + 1]
    earlier = prefix_sum(collectives.gather(sums[..., -1], split, -1))[..., split.chunks()]
    return (earlier[..., None] + sums[..., 1:]).flatten(-2)


def in_chunks(x: Tensor, split: Split) -> Tensor:
    return x.unflatten(-1, (split.chunks_per_rank, -1))
