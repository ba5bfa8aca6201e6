"""A short soak under NVIDIA's compute-sanitizer."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from tritonattn.cli.options import whole_number

# The soak itself finds reads of memory that was never written: it fills new memory with NaN.
TOOLS = ("memcheck", "racecheck", "synccheck")
# The first line of a finding, as a regular expression; a later line of it is indented. An end of the process is none.
FINDING = r"^========= (?!COMPUTE-SANITIZER|Warning:|Error: (process|Target)|Target|\w+ SUMMARY:)\w"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tools", type=lambda text: text.split(","), default=TOOLS, help="memcheck,racecheck,...")
    parser.add_argument("--trials", type=whole_number, default=100, help="calls of the soak under each tool")
    parser.add_argument("--minutes", type=float, default=600.0, help="how long under each tool, but one call at least")
    parser.add_argument("--seed", type=int, default=0, help="of the first call")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the tools one after another, and exit with an error where one finds something."""
    if reason := obstacle():
        sys.exit(f"sanitize: {reason}")
    found = [tool for tool in arguments.tools if _finds_something(tool, arguments)]
    if found:
        sys.exit(f"sanitize: {', '.join(found)} found errors")
    print(f"{', '.join(arguments.tools)}: no errors")


def obstacle() -> str | None:
    """Say why compute-sanitizer does not run on this machine, or return None."""
    if _sanitizer() is None:
        return "compute-sanitizer is neither on PATH nor in $CUDA_HOME/bin; it comes with the CUDA toolkit"
    if not torch.cuda.is_available() or torch.version.hip:
        return "compute-sanitizer needs an NVIDIA GPU, torch finds none"
    return None


def _sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(Path(home) / "bin"))


def _finds_something(tool: str, arguments: argparse.Namespace) -> bool:
    sanitizer = _sanitizer()
    assert sanitizer is not None
    # Bare, since memcheck would take the soak's guards for parts of the tensors.
    soak = ["-m", "perf", "soak", "--bare", "--device", "cuda", "--minutes", str(arguments.minutes)]
    soak += ["--trials", str(arguments.trials), "--seed", str(arguments.seed)]
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *_only_our_kernels(sanitizer), sys.executable, *soak]
    # Without torch's cache every tensor is an allocation with bounds.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    print(f"== {tool}", flush=True)
    return subprocess.run(command, env=environment, check=False).returncode != 0


def _only_our_kernels(sanitizer: str) -> list[str]:
    """Return options that check our kernels alone, under the name that this sanitizer has for them."""
    from tritonattn.backends.triton import KERNELS

    usage = subprocess.run([sanitizer, "--help"], capture_output=True, text=True, check=False).stdout
    option = next((name for name in ("--kernel-name", "--kernel-regex") if name in usage), None)
    if option is None:
        return []
    return [text for kernel in KERNELS.values() for text in (option, f"kns={kernel.__name__}")]
