"""Attention whose logit scaling is a parameter: exact, differentiable, on GPU (Triton) and CPU (PyTorch)."""

# ruff: noqa: E402

from .core.errors import guard_imports

guard_imports()  # before torch, whose import takes seconds

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

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


if not TYPE_CHECKING:  # a checker would take every name for one of ours

    def __getattr__(name: str) -> None:
        """Raise AttributeError, which says where the name is instead; Python adds the nearest one."""
        hint = ""
        if name in nn.__all__:
            hint = f"; there is tritonattn.nn.{name}"
        elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
            hint = f"; before its use: import tritonattn.{name}"
        raise AttributeError(
            f"module 'tritonattn' has no attribute {name!r}{hint}", name=name, obj=sys.modules[__name__]
        )


def __dir__() -> list[str]:
    imported = {"analysis", "distributed", "huggingface", "integrations", "tuning"} & set(globals())
    return sorted({*__all__, *imported})
