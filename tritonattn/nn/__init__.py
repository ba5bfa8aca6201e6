"""Modules: logit scalings with parameters of their own, and an attention layer around any scaling.

Every learned scaling is an `nn.Module` and a `tritonattn.Scaling`: pass it as `scaling=` to `attention`,
`attention_varlen` or `attention_decode`. Its parameters get exact gradients, through the kernels' query_scale and
without atomics.

Weight decay pulls these parameters towards 0, which is no neutral value for most of them: PerHead's theta = 0 is its
mode, but SSMax's s = 0 is uniform attention, and an exponent of 0 leaves a statistic out. Optimise them without decay:

>>> import torch, tritonattn
>>> model = torch.nn.ModuleDict({"project": torch.nn.Linear(64, 64), "scaling": tritonattn.nn.SSMax(heads=4)})
>>> undecayed = set(tritonattn.nn.scaling_parameters(model))
>>> optimizer = torch.optim.AdamW([
...     {"params": [p for p in model.parameters() if p not in undecayed], "weight_decay": 0.1},
...     {"params": list(undecayed), "weight_decay": 0.0},
... ])
"""

from .learned import Cosine, Learned, PerHead, SSMax, scaling_parameters
from .power_law import PowerLaw
from .scheduled import Scheduled

# What makes each mode that is learned a head, with heads=Hq and otherwise its defaults.
LEARNED: dict[str, type[Learned]] = {
    "per_head": PerHead,
    "ssmax": SSMax,
    "learned_cosine": Cosine,
    "power_law": PowerLaw,
}

__all__ = ["LEARNED", "Cosine", "Learned", "PerHead", "PowerLaw", "SSMax", "Scheduled", "scaling_parameters"]
