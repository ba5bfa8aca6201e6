"""Logit scalings: the interface and the modes that a name selects."""

from .base import Scales, Scaling
from .constants import Dim, Given, SqrtDim, Unscaled
from .cosine import Cosine
from .counts import KeyCount, LogKeyCount, LogPower, SqrtKeyCount
from .key_norms import KeyNormL2, KeyNormMax, KeyNormMean, KeyNormRms, KeyNormSum
from .positional import Llama4, Ministral3, QwenLogn

SCALINGS: dict[str, type[Scaling]] = {
    "sqrt_dim": SqrtDim,
    "dim": Dim,
    "none": Unscaled,
    "key_count": KeyCount,
    "sqrt_key_count": SqrtKeyCount,
    "key_norm_sum": KeyNormSum,
    "key_norm_mean": KeyNormMean,
    "key_norm_rms": KeyNormRms,
    "key_norm_max": KeyNormMax,
    "key_norm_l2": KeyNormL2,
    "log_key_count": LogKeyCount,
    "log_power": LogPower,
    "qwen_logn": QwenLogn,
    "llama4": Llama4,
    "ministral3": Ministral3,
    "cosine": Cosine,
}

__all__ = [
    "SCALINGS",
    "Cosine",
    "Dim",
    "Given",
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
    "Scales",
    "Scaling",
    "SqrtDim",
    "SqrtKeyCount",
    "Unscaled",
]
