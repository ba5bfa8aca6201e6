"""`tritonattn env`."""

from __future__ import annotations

import argparse
import platform
from importlib.util import find_spec

import torch

from .. import __version__
from ..core.provenance import TRITON, version

HELP = "print versions, GPU, and the tables in use: for a report"
DESCRIPTION = "Print versions, GPU, driver, compilers and the tables in use: paste it into a bug report."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing."""


def run(options: argparse.Namespace) -> int:
    """Print the versions, then how kernels run; triton may be missing."""
    facts = {
        "tritonattn": __version__,
        "torch": torch.__version__,
        "triton": version(*TRITON),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": str(torch.version.cuda),
        "hip": str(torch.version.hip),
    }
    if find_spec("triton") is None:
        facts["kernels run"] = "never: triton is not installed"
    else:
        from ..tuner.in_use import kernel_facts

        facts |= kernel_facts()
    for name, value in facts.items():
        print(f"{name}: {value}")
    return 0
