"""The version of ptxas, which assembles what Triton compiles for NVIDIA's cards, and versions known for wrong code."""

from __future__ import annotations

import re

import torch
from triton.backends.nvidia import compiler

from .config import Target

# CUDA releases whose ptxas made wrong code of right PTX for a kernel of flash-linear-attention; 13.1.80's was right.
# https://github.com/fla-org/flash-linear-attention/issues/1262
_SUSPECT = {
    "12.8": "wrong results",
    "13.0": "an invalid write to shared memory",
}


def ptxas_version(capability: int) -> str:
    """Return "12.9.86" or the like for a compute capability such as 90; TRITON_PTXAS_PATH chooses another.

    Triton brings one ptxas for older cards and, from 3.6 on, one for newer ones.
    """
    try:
        text = compiler.get_ptxas_version(capability)
    except TypeError:  # triton 3.4 has one for all cards
        text = compiler.get_ptxas_version()  # pyright: ignore[reportCallIssue]
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    return found[1] if found else "unknown"


def ptxas_of(device: torch.device) -> str:
    """Return the version that compiles for a device; "" on a CPU and on AMD."""
    if device.type != "cuda" or torch.version.hip:
        return ""
    return ptxas_version(int(Target.of(device).arch))


def suspicion(version: str) -> str | None:
    """Say what went wrong with this version's code elsewhere, and what to do; None for other versions."""
    release = ".".join(version.split(".")[:2])
    if release not in _SUSPECT:
        return None
    return (
        f"ptxas {version}: CUDA {release}'s is known for {_SUSPECT[release]} in another library; set TRITON_PTXAS_PATH"
        " to a newer one, which `pip install nvidia-cuda-nvcc` brings, or take triton >= 3.8"
    )
