"""The torch.library operators over the backends, and their differentiation. No mathematics.

`tritonattn::forward`, `tritonattn::backward`, `tritonattn::tangent` and `tritonattn::second` (passes.py) take an
AttentionCall laid out flat (operators.py), whose backend is "triton" (imported at first use) or "sdpa".
`tritonattn::key_norms`, `tritonattn::key_norms_backward` and `tritonattn::prefix_sums` feed the scalings that look at
keys. A plain eager call runs the backend itself and spares the time of the dispatcher; compilers, transforms and
dispatch modes meet the operators.
"""

from .attend import attention
from .statistics import KernelStatistics, launches

__all__ = ["KernelStatistics", "attention", "launches"]
