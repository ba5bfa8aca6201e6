"""Modules: logit scalings that learn, and an attention layer around any scaling.

Every learned scaling is an `nn.Module` and a `tritonattn.Scaling`: pass it as `scaling=` to `attention`,
`attention_varlen` or `attention_decode`. Its parameters get exact gradients, through the kernels' query_scale and
without atomics.

Weight decay pulls these parameters towards 0, which is no neutral value for most of them: PerHead's theta = 0 is its
mode, but SSMax's s = 0 is uniform attention, and an exponent of 0 leaves a statistic out. Optimise them without decay:

>>> import torch, tritonattn
>>> model = tritonattn.nn.ScaledAttention(64, heads=4, scaling="ssmax", causal=True)
>>> undecayed = set(tritonattn.nn.scaling_parameters(model))
>>> optimizer = torch.optim.AdamW([
...     {"params": [p for p in model.parameters() if p not in undecayed], "weight_decay": 0.1},
...     {"params": list(undecayed), "weight_decay": 0.0},
... ])
"""

from ..core.row_terms import counted_from_rows
from .attention import ScaledAttention
from .biases import ALiBi, ForgetGate
from .cache import KeyValueCache
from .learned import Learned, LearnedCosine, PerHead, SSMax, scaling_parameters
from .log_power import LearnedLogPower, QueryAdaptiveSSMax
from .power_law import PowerLaw
from .registry import LEARNED
from .scheduled import Scheduled

__all__ = [
    "LEARNED",
    "ALiBi",
    "ForgetGate",
    "KeyValueCache",
    "Learned",
    "LearnedCosine",
    "LearnedLogPower",
    "PerHead",
    "PowerLaw",
    "QueryAdaptiveSSMax",
    "SSMax",
    "ScaledAttention",
    "Scheduled",
    "counted_from_rows",
    "scaling_parameters",
]


def __dir__() -> list[str]:
    return sorted(__all__)
