"""What a figure depends on: the machine, the versions, the commit."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch

import tritonattn
from tritonattn.core.provenance import commit, processor, version

PEERS = ("flash-attn", "flash-attn-3", "flash-attn-4", "xformers")  # the names under which they are installed


@dataclass(frozen=True)
class Environment:
    """Where figures come from.

    device     name of the card or the processor
    threads    of torch on a CPU; None on a GPU
    commit     where files differ from it, or there is none, with a digest of the code
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
            commit=_commit(),
            command=command,
            peers=", ".join(f"{name} {version(name)}" for name in PEERS if version(name) != "not installed"),
        )

    def __str__(self) -> str:
        threads = "" if self.threads is None else f" ({self.threads} threads)"
        versions = f"torch {self.torch}, triton {self.triton}, tritonattn {self.tritonattn}, Python {self.python}"
        versions += f", {self.peers}" if self.peers else ""
        return f"{self.device}{threads}, {versions}, commit {self.commit}, `{self.command}`"


def _commit() -> str:
    """A run goes on with records of the same: edited code, or a copy of a checkout without .git, must be told apart."""
    found, root = commit(), Path(__file__).resolve().parents[1]
    if found != "unknown" and not (found.endswith("-dirty") and differs(root)):
        return found.removesuffix("-dirty")
    return f"{found} (code {digest(root)})"


_CODE = ("tritonattn/**/*.py", "perf/*.py", "autotune_cache/*.json")  # not the results, which a run may append to


def differs(root: Path) -> bool:
    """Whether what figures depend on is other than the commit has it."""
    paths = [f":(glob){pattern}" for pattern in _CODE]
    return (
        subprocess.run(["git", "-C", str(root), "diff", "--quiet", "HEAD", "--", *paths], check=False).returncode != 0
    )


def digest(root: Path) -> str:
    """Of what figures depend on."""
    total = sha256()
    for path in sorted(path for pattern in _CODE for path in root.glob(pattern)):
        total.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return total.hexdigest()[:12]
