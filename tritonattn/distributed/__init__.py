"""Attention on several processes: a sequence that they share, and heads that they share.

Built on torch.distributed: a `DeviceMesh` of one dimension names the ranks.
"""

from . import operators
from .context_parallel import context_parallel_attention
from .cut import pad, shard, unshard
from .decode import context_parallel_decode
from .layers import ContextParallel, HeadParallel

operators.register()

__all__ = [
    "ContextParallel",
    "HeadParallel",
    "context_parallel_attention",
    "context_parallel_decode",
    "pad",
    "shard",
    "unshard",
]


def __dir__() -> list[str]:
    return sorted(__all__)
