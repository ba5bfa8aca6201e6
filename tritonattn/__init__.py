"""Attention whose logit scaling is a parameter: exact, differentiable, on GPU (Triton) and CPU (PyTorch)."""

from . import nn
from .api import attention, scaled_attention
from .cache_statistics import KeyStatistics
from .decoding import attention_decode
from .dispatch import AttentionAux
from .scaling import SCALINGS, Scales, Scaling
from .varlen import attention_varlen
from .warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "SCALINGS",
    "AttentionAux",
    "KeyStatistics",
    "Scales",
    "Scaling",
    "__version__",
    "attention",
    "attention_decode",
    "attention_varlen",
    "nn",
    "scaled_attention",
    "warmup",
]
