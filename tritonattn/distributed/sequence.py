"""A sequence that ranks share, and the vectors of a scaling for this rank's rows, as one process computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..calls.dispatch import logits
from ..core.call import AttentionCall, Gradients, Logits
from ..core.sequences import Sequences
from ..core.statistics import Statistics
from ..core.visibility import Visibility
from . import collectives
from .layout import Split
from .statistics import SharedStatistics


@dataclass(frozen=True, eq=False)
class SharedSequence:
    """A sequence of S tokens that the ranks of `split` hold parts of, and the part that this rank's rows attend to.

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
        own = None
        if not whole.is_full:
            positions = split.positions(q.shape[2], q.device)
            own = torch.stack([bound[:, positions] for bound in whole.ranges()], -1).expand(q.shape[0], -1, -1)
        return cls(split, whole, Visibility.of_shapes(q.shape, k_shape, q.device, key_ranges=own))

    @property
    def length(self) -> int:
        return self.whole.k_len

    @property
    def ends_at_own(self) -> bool:
        """True where no row attends to a key behind its position."""
        return self.whole.right == 0

    def of_all_rows(self, q: Tensor, k: Tensor) -> Visibility:
        """`whole`, of some heads: q [B, H, S, D] and k."""
        if self.whole.sequences is None:
            return Visibility.of(q, k, window=(self.whole.left, self.whole.right))
        return Visibility.of(q, k, key_ranges=torch.stack(self.whole.ranges(), -1).expand(q.shape[0], -1, -1))


class Settings(NamedTuple):
    """A call's arguments that are no tensors.

    heads   key heads whose keys and values are gathered at a time
    """

    sequence: SharedSequence
    scale: float
    softcap: float | None
    backend: str
    heads: int
    reduce_dtype: torch.dtype
    aux: bool
    keep_rounding: bool


_ALL = slice(None)


class Piece(NamedTuple):
    """Rows of this rank and keys of all ranks that one call computes, for some heads of q and of k."""

    rows: slice
    keys: slice
    q_heads: slice = _ALL
    kv_heads: slice = _ALL

    @property
    def indices(self) -> Gradients:
        """Indices of the piece in the tensors of a call; k and v differ by method."""
        rows, keys = (_ALL, self.q_heads, self.rows), (_ALL, self.kv_heads, self.keys)
        of_bias: Any = (_ALL, self.kv_heads, _ALL, self.keys)
        return Gradients(rows, None, None, rows, keys, of_bias, self.q_heads)  # pyright: ignore[reportArgumentType]

    def cut(self, tensors: Sequence[Tensor | None], settings: Settings) -> tuple[Tensor, Logits]:
        """q and the terms of the logits of the piece."""
        q, _, _, query, key, bias, sinks, *_ = (
            None if x is None or index is None else x[index] for x, index in zip(tensors, self.indices, strict=True)
        )
        assert q is not None
        return q, Logits(settings.scale, query, key, bias, settings.softcap, sinks)

    def add(self, sums: Gradients, got: Gradients) -> None:
        """Add the piece's gradients, but those of k and v, to the sums that are asked for."""
        for total, index, gradient in zip(sums, self.indices, got, strict=True):
            if index is not None:
                add_part(total, index, gradient)


def logits_of(call: AttentionCall, sequence: SharedSequence, reduce_dtype: torch.dtype) -> Logits:
    """The terms of a call's logits, those of rows of this rank, those of keys of all; differentiable.

    key_bias, of this rank's keys, is gathered and added to the scaling's bias. A scaling that reads keys itself
    (`Scaling.reads_keys`) gets all of them, gathered.
    """
    k, key_bias, split = call.k, call.logits.key_bias, sequence.split
    visible = call.visibility = sequence.visibility
    if call.scaling.reads_keys:
        whole = collectives.gather(k, split, 2, torch.promote_types(reduce_dtype, k.dtype))
        statistics = Statistics(whole, visible)
    else:
        whole = k.detach()[:, :, :1].expand(-1, -1, sequence.length, -1)  # a shape; its values are not read
        by_totals = sequence.length > 0 and (sequence.whole.is_full or sequence.whole.is_square_causal)
        statistics = SharedStatistics(k, visible, split, by_totals)
    if key_bias is not None:
        own = key_bias.expand((*key_bias.shape[:-1], k.shape[2]))
        key_bias = collectives.gather(own, split, -1, torch.promote_types(reduce_dtype, own.dtype))
        call.logits = Logits(key_bias=key_bias, softcap=call.logits.softcap, sinks=call.logits.sinks)
    return logits(call, statistics, whole)


def add_part(total: Tensor | None, index: Any, gradient: Tensor | None) -> None:
    """Add the gradient of a part of a tensor to that of the whole, where both are asked for."""
    if total is not None and gradient is not None:
        total[index] += gradient


def share_with_sinks(lse: Tensor, sinks: Tensor) -> Tensor:
    """The weight of keys with a sink [Hq]: exp(lse) / (exp(lse) + exp(sink)), 0 for a row without keys."""
    return torch.sigmoid(lse - sinks[:, None]).masked_fill(lse == -torch.inf, 0)
