"""Versions, GPU and tables in use, for the report of a problem: `tritonattn env`."""

from __future__ import annotations

import platform
from importlib.util import find_spec

import torch

from ..core.provenance import version


def environment() -> dict[str, str]:
    """Describe the versions, then how kernels run, in the order in which they are printed; triton may be missing."""
    facts = {
        "tritonattn": version("tritonattn"),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": str(torch.version.cuda),
        "hip": str(torch.version.hip),
    }
    if find_spec("triton") is None:
        return facts | {"kernels run": "never: triton is not installed"}
    from .in_use import kernel_facts

    return facts | kernel_facts()
