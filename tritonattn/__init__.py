"""Attention whose logit scaling is a parameter: exact, differentiable, on GPU (Triton) and CPU (PyTorch)."""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from . import nn
from .calls.attention import attention, scaled_attention
from .calls.check_scaling import check_scaling
from .calls.decode import attention_decode
from .calls.documents import document_ranges
from .calls.key_counts import key_counts, key_counts_decode, key_counts_varlen
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
    "key_counts",
    "key_counts_decode",
    "key_counts_varlen",
    "nn",
    "scaled_attention",
    "warmup",
]


_FOLDERS = ("analysis", "distributed", "huggingface", "integrations", "tuning")  # imported at their first use

if TYPE_CHECKING:
    from . import analysis as analysis
    from . import distributed as distributed
    from . import huggingface as huggingface
    from . import integrations as integrations
    from . import tuning as tuning
else:  # a checker would take every name for one of ours

    def __getattr__(name: str) -> ModuleType:
        """Import a public folder; of other names raise AttributeError, which says where the name is instead.

        Python adds the nearest name.
        """
        if name in _FOLDERS:
            return import_module(f".{name}", __name__)
        hint = ""
        if name in nn.__all__:
            hint = f"; there is tritonattn.nn.{name}"
        elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
            hint = f"; before its use: import tritonattn.{name}"
        elif folder := next((one for one in _FOLDERS if f'    "{name}",' in _source(one)), None):
            hint = f"; there is tritonattn.{folder}.{name}"
        raise AttributeError(
            f"module 'tritonattn' has no attribute {name!r}{hint}", name=name, obj=sys.modules[__name__]
        )

    def _source(folder: str) -> str:
        """The text of a folder's __init__.py, whose import may need other packages; a kernel of the hub lacks some."""
        file = Path(__file__).parent / folder / "__init__.py"
        return file.read_text(encoding="utf-8") if file.is_file() else ""


def __dir__() -> list[str]:
    needs = {"huggingface": "transformers"}
    return sorted({*__all__, *(one for one in _FOLDERS if one not in needs or find_spec(needs[one]) is not None)})
