"""Attention over the keys of a KV cache: no gradients, and scales from a record of key norms where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..backends import reference
from ..core.call import ForwardResult, Logits
from ..core.statistics import Statistics
from ..core.visibility import Visibility
from .cached_statistics import CachedStatistics, KeyRecord
from .checks import Options
from .decode_checks import refuse_gradients
from .dispatch import AttentionAux, aux_of, sinks_of
from .factor import Factor


class CachedKeys(NamedTuple):
    """The keys and values of a call over a cache.

    call         the public function, in errors
    keys         computes k [B, Hkv, Sk, D] along the key axis of the visibility; a copy where it lies in pages
    values       likewise v
    visibility   which of them each row sees
    in_pages     whether `keys` is a copy
    record       of their norms, or None
    width        keys that a row sees at most, or None: as of `CachedStatistics`
    """

    call: str
    keys: Callable[[], Tensor]
    values: Callable[[], Tensor]
    visibility: Visibility
    in_pages: bool
    record: KeyRecord | None
    width: int | None


class CachedCall(NamedTuple):
    """A checked call over a cache, but for its factor.

    run   computes the results from the terms of the logits, on a backend other than the reference
    """

    q: Tensor
    cached: CachedKeys
    options: Options
    backend: str
    run: Callable[[Logits], ForwardResult]

    def attend(self, factor: Factor) -> Tensor | tuple[Tensor, AttentionAux]:
        """out, with aux also `AttentionAux`."""
        result = self.by_formulas(factor) if self.backend == "reference" else self.run(self.logits(factor))
        if not self.options.return_aux:
            return result.out
        return result.out, aux_of(result)

    def by_formulas(self, factor: Factor) -> ForwardResult:
        q, cached, options = self.q, self.cached, self.options
        keys, visibility = cached.keys(), cached.visibility
        multiplier, bias = factor.dense(q, keys, visibility, options.key_bias)
        extras = {"bias": bias, "softcap": options.cap, "sinks": sinks_of(q, options)}
        return reference.attention(q, keys, cached.values(), multiplier, visibility, **extras)

    def logits(self, factor: Factor) -> Logits:
        """Compute the terms of the logits, those of the mode from the record of the cache or else from its keys."""
        q, cached, options = self.q, self.cached, self.options
        visibility = cached.visibility
        if cached.in_pages and not factor.scaling.reads_keys:
            keys = q.new_full((), torch.nan).expand(*visibility.keys, q.shape[3])  # a shape, in place of a copy
        else:
            keys = cached.keys()
        kind = ops.KernelStatistics if self.backend == "triton" else Statistics
        statistics = kind(cached.keys, visibility)
        if cached.record is not None:
            statistics = CachedStatistics(statistics, cached.record, cached.width)
        logits = factor.logits(q, keys, visibility, statistics, options.key_bias, options.cap, sinks_of(q, options))
        refuse_gradients(cached.call, scaling=logits.query_scale, key_scale=logits.key_scale, key_bias=logits.key_bias)
        return logits
