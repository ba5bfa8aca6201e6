"""The torch.library operators over the backends, and their differentiation. No mathematics.

`tritonattn::forward` and `tritonattn::backward` take an AttentionCall laid out flat and the name of the
backend that runs it: "triton" (triton_backend, imported at first use) or "sdpa" (blockwise).
`tritonattn::key_norms`, `tritonattn::key_norms_backward` and `tritonattn::prefix_sums` feed the scalings
that look at keys; `tritonattn::decode` is attention against a KV cache. A plain eager call runs the backend itself
and spares the time of the dispatcher; compilers, transforms and dispatch modes see the operators.
"""

from .attend import attention
from .decode import decode
from .key_statistics import KernelStatistics

__all__ = ["KernelStatistics", "attention", "decode"]
