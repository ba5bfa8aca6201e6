"""The origin of the figures of a document: machine, versions, commit, command."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module, metadata
from pathlib import Path

import torch

TRITON = ("triton", "triton-windows")  # packages that bring the module
# The code that figures depend on, in a checkout; results lie with it, and a run may append to them.
_CODE = ("tritonattn/**/*.py", "perf/**/*.py", "autotune_cache/*.json")


@dataclass(frozen=True)
class Environment:
    """The machine, versions and commit of a measurement.

    device     name of the card or the processor
    threads    of torch on a CPU; None on a GPU
    commit     as `commit` returns it
    command    the command that measured; "" where other commands give the same figures
    peers      versions of the libraries that were measured with this one
    ptxas      the version that compiles kernels for this card; "" on a CPU and on AMD
    """

    device: str
    threads: int | None
    python: str
    torch: str
    tritonattn: str
    commit: str
    triton: str = ""
    command: str = ""
    peers: str = ""
    ptxas: str = ""

    @classmethod
    def of(cls, device: torch.device, command: str = "", peers: Iterable[str] = (), ptxas: str = "") -> Environment:
        """Describe this process; of the peers, named as on PyPI, those that are installed."""
        on_gpu = device.type == "cuda"
        installed = {name: version(name) for name in peers}
        return cls(
            device=torch.cuda.get_device_name(device) if on_gpu else processor(),
            threads=None if on_gpu else torch.get_num_threads(),
            python=platform.python_version(),
            torch=torch.__version__,
            tritonattn=import_module(__name__.partition(".")[0]).__version__,
            commit=commit(),
            triton=version(*TRITON),
            ptxas=ptxas,
            command=command,
            peers=", ".join(f"{name} {found}" for name, found in installed.items() if found != _MISSING),
        )

    def __str__(self) -> str:
        threads = "" if self.threads is None else f" ({self.threads} thread{'s' * (self.threads != 1)})"
        versions = [f"torch {self.torch}", f"triton {self.triton}" * bool(self.triton)]
        versions += [f"ptxas {self.ptxas}" * bool(self.ptxas)]
        versions += [f"tritonattn {self.tritonattn}", f"Python {self.python}", self.peers]
        command = f", `{self.command}`" * bool(self.command)
        return f"{self.device}{threads}, {', '.join(filter(None, versions))}, commit {self.commit}{command}"


def command_line() -> str:
    """Return the running command as one would type it."""
    program = Path(sys.argv[0])
    name = f"python -m {program.parent.name}" if program.name == "__main__.py" else program.name
    words = [name, *(shlex.quote(word) for word in sys.argv[1:])]
    return " ".join(words)


def commit() -> str:
    """Name the commit of the checkout that the package lies in, "unknown" outside of one.

    A digest of the code follows where the code differs from the commit, or the commit is unknown, so that figures of
    edited code are told apart.
    """
    root = Path(__file__).resolve().parents[2]
    described = _git(root, "describe", "--always") if (root / ".git").exists() else None
    name = "unknown" if described is None or described.returncode != 0 else described.stdout.strip()
    return name if name != "unknown" and not differs(root) else f"{name} (code {digest(root)})"


def differs(root: Path) -> bool:
    """True where the code in a checkout differs from its commit."""
    changed = _git(root, "diff", "--quiet", "HEAD", "--", *(f":(glob){pattern}" for pattern in _CODE))
    return changed is None or changed.returncode != 0


def digest(root: Path) -> str:
    """Hash the code below a folder: 12 hexadecimal digits."""
    total = sha256()
    for path in sorted(path for pattern in _CODE for path in root.glob(pattern)):
        total.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return total.hexdigest()[:12]


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str] | None:
    """Run git in a folder; None without git."""
    try:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None


_MISSING = "not installed"


def version(*packages: str) -> str:
    """Return the version of the first of the packages that is installed, or "not installed"."""
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    return _MISSING


def processor() -> str:
    """Name the processor, as /proc/cpuinfo does where it exists."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
