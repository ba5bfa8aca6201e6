"""What a figure depends on: the machine, the versions, the commit."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch

import tritonattn
from tritonattn.provenance import commit, processor, version

PEERS = ("flash-attn", "flash-attn-3", "flash-attn-4", "xformers")  # the names under which they are installed


@dataclass(frozen=True)
class Environment:
    """Where figures come from.

    device     name of the card or the processor
    threads    of torch on a CPU; None on a GPU
    command    that which measured, without the files it wrote to
    peers      versions of the other libraries that are installed
    """

    device: str
    threads: int | None
    python: str
    torch: str
    triton: str
    tritonattn: str
    commit: str
    command: str
    peers: str = ""

    @classmethod
    def of(cls, device: torch.device, command: str) -> Environment:
        on_gpu = device.type == "cuda"
        return cls(
            device=torch.cuda.get_device_name(device) if on_gpu else processor(),
            threads=None if on_gpu else torch.get_num_threads(),
            python=platform.python_version(),
            torch=torch.__version__,
            triton=version("triton"),
            tritonattn=tritonattn.__version__,
            commit=commit(),
            command=command,
            peers=", ".join(f"{name} {version(name)}" for name in PEERS if version(name) != "not installed"),
        )

    def __str__(self) -> str:
        threads = "" if self.threads is None else f" ({self.threads} threads)"
        versions = f"torch {self.torch}, triton {self.triton}, tritonattn {self.tritonattn}, Python {self.python}"
        versions += f", {self.peers}" if self.peers else ""
        return f"{self.device}{threads}, {versions}, commit {self.commit}, `{self.command}`"
