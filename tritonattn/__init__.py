"""Attention whose logit scaling is a parameter: exact, differentiable, on GPU (Triton) and CPU (PyTorch)."""

# ruff: noqa: E402

from .core.errors import guard_imports

guard_imports()  # before torch, whose import takes seconds

from . import nn
from .calls.attention import attention, scaled_attention
from .calls.check_scaling import check_scaling
from .calls.decode import attention_decode
from .calls.documents import document_ranges
from .calls.key_statistics import KeyStatistics
from .calls.paged_statistics import PagedKeyStatistics
from .calls.results import AttentionAux
from .calls.varlen import attention_varlen
from .calls.warmup import warmup
from .core.invariance import batch_invariant
from .scaling import SCALINGS, Scales, Scaling

__version__ = "0.2.0"

__all__ = [
    "SCALINGS",
    "AttentionAux",
    "KeyStatistics",
    "PagedKeyStatistics",
    "Scales",
    "Scaling",
    "__version__",
    "attention",
    "attention_decode",
    "attention_varlen",
    "batch_invariant",
    "check_scaling",
    "document_ranges",
    "nn",
    "scaled_attention",
    "warmup",
]


def __dir__() -> list[str]:
    imported = {"analysis", "distributed", "huggingface", "integrations", "tuning"} & set(globals())
    return sorted({*__all__, *imported})
