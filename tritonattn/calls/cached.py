"""Calls over a KV cache: statistics of its keys, and the refusal of gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..core.autograd import needs_graph
from ..core.call import AttentionCall
from ..core.key_records import RecordedStatistics
from ..core.pages import PageTable
from ..core.statistics import Statistics


def cached_statistics(call: AttentionCall) -> Statistics:
    """The statistics of a call over a cache."""
    computed = (ops.KernelStatistics if call.backend == "triton" else Statistics)(call.keys, call.visibility)
    if call.record is None:
        return computed
    table = None
    if call.block_table is not None:
        table = PageTable(call.block_table, call.k.shape[2], call.visibility.sequences)
    return RecordedStatistics(computed, call.record, table, _width(call))


def _width(call: AttentionCall) -> int | None:
    """The most keys that a row sees, as of `RecordedStatistics`."""
    visible, sequences = call.visibility, call.visibility.sequences
    if visible.left is None:
        return None
    if sequences is None:
        return visible.left + 1
    right = sequences.longest_k if visible.right is None else visible.right
    return min(visible.left + 1 + right, sequences.longest_k)


def keys_for_scaling(call: AttentionCall) -> Tensor:
    """What a scaling has for k: a shape alone, in place of a copy of pages, where it reads no keys."""
    if call.block_table is None or call.scaling.reads_keys:
        return call.keys()
    return call.q.new_full((), torch.nan).expand(*call.visibility.keys, call.q.shape[3])


def refuse_gradients(call: str, /, **tensors: Any) -> None:
    """Raise where one of these tensors would have to carry a derivative of a `call`."""
    for name, x in tensors.items():
        if isinstance(x, Tensor) and needs_graph(x):
            raise NotImplementedError(
                f"{name}: {call} has no gradient, got a tensor that requires one; call it under"
                " torch.no_grad() or torch.inference_mode(), or `attention`, which has"
            )
