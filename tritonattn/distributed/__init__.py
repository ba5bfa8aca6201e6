"""One sequence on several processes: `context_parallel_attention`, and `shard` / `unshard` of what goes with it.

Built on torch.distributed: a `DeviceMesh` of one dimension names the ranks that share a sequence.
"""

from .context_parallel import context_parallel_attention
from .sharding import shard, unshard

__all__ = ["context_parallel_attention", "shard", "unshard"]


def __dir__() -> list[str]:
    return sorted(__all__)
