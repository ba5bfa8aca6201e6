"""Logit scalings: the interface and the modes."""

from .base import Scales, Scaling
from .constants import Dim, Given, SqrtDim, Unscaled
from .cosine import Cosine
from .counts import KeyCount, LogKeyCount, LogPower, SqrtKeyCount
from .distances import ScaleInvariant
from .key_norms import KeyNormL2, KeyNormMax, KeyNormMean, KeyNormRms, KeyNormSum
from .names import SCALINGS
from .positional import Beam, Grok2, Inkling, Inkling2, Llama4, Ministral3, QwenLogn

__all__ = [
    "SCALINGS",
    "Beam",
    "Cosine",
    "Dim",
    "Given",
    "Grok2",
    "Inkling",
    "Inkling2",
    "KeyCount",
    "KeyNormL2",
    "KeyNormMax",
    "KeyNormMean",
    "KeyNormRms",
    "KeyNormSum",
    "Llama4",
    "LogKeyCount",
    "LogPower",
    "Ministral3",
    "QwenLogn",
    "ScaleInvariant",
    "Scales",
    "Scaling",
    "SqrtDim",
    "SqrtKeyCount",
    "Unscaled",
]
