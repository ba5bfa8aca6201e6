"""What the figures of a document depend on: machine, versions, commit; and how they are written down."""

from __future__ import annotations

import math
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Environment:
    """Where figures come from.

    device    name of the card or the processor
    threads   of torch on a CPU; None on a GPU
    commit    of the checkout that the package lies in, "-dirty" where files differ from it, "unknown" outside of one
    """

    device: str
    threads: int | None
    python: str
    torch: str
    tritonattn: str
    commit: str

    @classmethod
    def of(cls, device: torch.device) -> Environment:
        on_gpu = device.type == "cuda"
        return cls(
            device=torch.cuda.get_device_name(device) if on_gpu else processor(),
            threads=None if on_gpu else torch.get_num_threads(),
            python=platform.python_version(),
            torch=torch.__version__,
            tritonattn=version("tritonattn"),
            commit=commit(),
        )

    def __str__(self) -> str:
        threads = "" if self.threads is None else f" ({self.threads} thread{'s' * (self.threads != 1)})"
        versions = f"torch {self.torch}, tritonattn {self.tritonattn}, Python {self.python}"
        return f"{self.device}{threads}, {versions}, commit {self.commit}"


def command_line() -> str:
    """The command that runs, as one would type it."""
    name = Path(sys.argv[0]).name
    words = ["python -m tritonattn" if name == "__main__.py" else name, *(shlex.quote(word) for word in sys.argv[1:])]
    return " ".join(words)


def commit() -> str:
    """That of the checkout that the package lies in, "-dirty" where files differ from it, "unknown" outside of one."""
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def version(package: str) -> str:
    """The installed version, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """Its name, as /proc/cpuinfo has it where that is."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def for_json(x: Any, digits: int | None = None) -> Any:
    """x with None for the floats in it that are not finite, and the others to so many digits, where that is given."""
    if isinstance(x, dict):
        return {name: for_json(value, digits) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [for_json(value, digits) for value in x]
    if not isinstance(x, float):
        return x
    if not math.isfinite(x):
        return None
    return x if digits is None else float(f"{x:.{digits}g}")
