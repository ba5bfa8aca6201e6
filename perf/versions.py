"""What a figure depends on: the machine, the versions, the commit."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

import tritonattn


@dataclass(frozen=True)
class Environment:
    """Where figures come from.

    device     name of the card or the processor
    threads    of torch on a CPU; None on a GPU
    command    that which measured, without the files it wrote to
    """

    device: str
    threads: int | None
    python: str
    torch: str
    triton: str
    tritonattn: str
    commit: str
    command: str

    @classmethod
    def of(cls, device: torch.device, command: str) -> Environment:
        on_gpu = device.type == "cuda"
        return cls(
            device=torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
            threads=None if on_gpu else torch.get_num_threads(),
            python=platform.python_version(),
            torch=torch.__version__,
            triton=version("triton"),
            tritonattn=tritonattn.__version__,
            commit=commit(),
            command=command,
        )

    def __str__(self) -> str:
        threads = "" if self.threads is None else f" ({self.threads} threads)"
        versions = f"torch {self.torch}, triton {self.triton}, tritonattn {self.tritonattn}, Python {self.python}"
        return f"{self.device}{threads}, {versions}, commit {self.commit}, `{self.command}`"


def commit() -> str:
    """The commit of this checkout, "-dirty" where files differ from it, "unknown" outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
