"""`tritonattn env`: what a report of a problem should say."""

from __future__ import annotations

import platform
from importlib import metadata
from importlib.util import find_spec

import torch


def environment() -> dict[str, str]:
    """Versions, then what the kernels run with, in the order in which they are printed; triton may be missing."""
    facts = {
        "tritonattn": _version("tritonattn"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": str(torch.version.cuda),
        "hip": str(torch.version.hip),
    }
    if find_spec("triton") is None:
        return facts | {"kernels run": "never: triton is not installed"}
    from .in_use import kernel_facts

    return facts | kernel_facts()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
