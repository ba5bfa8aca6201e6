"""The gate before a config is timed, or written without a GPU: its code compiles, fits, and spills little."""

from __future__ import annotations

import re
import signal
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.compiler import CompiledKernel

from ..backends.triton.compile import compile_kernel
from ..tuning.config import (
    TENSOR_MEMORY_COLUMNS,
    Problem,
    Target,
    TileConfig,
    legal_reasons,
    one_line,
)
from ..tuning.ptxas import ptxas_version

_TOOLS = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin"

# Bytes a thread, half of its registers: code outside of loops may spill (that of shipped configs up to 472), and a
# search times what is left.
_MOST_SPILLED = 512
_REGISTERS_OF_A_TRAP = 4

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Code:
    """A kernel's registers and bytes of spills per thread, bytes of shared memory, columns of tensor memory."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_memory: int = 0


@dataclass(frozen=True)
class Candidate:
    """A config, its code (None where it did not compile), and the reasons to refuse it."""

    config: TileConfig
    code: Any
    reasons: tuple[str, ...]

    def details(self) -> dict[str, Any]:
        """The properties of its code that an entry of a table names."""
        return {name: getattr(self.code, name) for name in ("registers", "spill_bytes", "shared_bytes")}


Examine = Callable[[str, Problem, TileConfig, Target], Candidate]


def examine(kernel: str, problem: Problem, config: TileConfig, target: Target) -> Candidate:
    """Compile a config without a GPU, and hold its code to the gate."""

    def read(compiled: CompiledKernel) -> Candidate:
        code = read_code(compiled)
        spilled = [f"spills {code.spill_bytes} bytes a thread"] if code.spill_bytes > _MOST_SPILLED else []
        return Candidate(config, code, (*spilled, *memory_reasons(code, target)))

    return compiled_candidate(kernel, problem, config, target, read)


def compiled_candidate(
    kernel: str, problem: Problem, config: TileConfig, target: Target, read: Callable[[CompiledKernel], Candidate]
) -> Candidate:
    """Compile a config, where it is legal, and `read` its code."""
    if reasons := legal_reasons(kernel, config, problem, target):
        return Candidate(config, None, tuple(reasons))
    try:
        compiled = compile_kernel(kernel, problem, config, target)
        found = read(compiled)
    except Exception as error:  # a compiler may raise anything; the config is refused
        return Candidate(config, None, (f"does not compile: {one_line(error)}",))
    unspecialised = _unspecialised_reasons(compiled, found) if config.warp_specialize else []
    return replace(found, reasons=(*found.reasons, *unspecialised))


def _unspecialised_reasons(compiled: CompiledKernel, found: Candidate) -> list[str]:
    """List reasons why a loop is not divided among warps.

    Triton makes two or three partitions, or leaves the loop as it was. Where it needs more tensor memory than there is,
    the code is a trap, of 4 registers.
    """
    reasons = []
    partitions = len(re.findall(r"^\s*partition\d+\(", compiled.asm["ttgir"], re.MULTILINE))
    if partitions < 2:
        reasons.append(f"has {partitions} partitions: its loop is not divided among warps")
    if found.code.registers <= _REGISTERS_OF_A_TRAP:
        reasons.append(f"has {found.code.registers} registers: its code is a trap")
    if found.code.spill_bytes:
        reasons.append(f"spills {found.code.spill_bytes} bytes a thread where partitions share out the registers")
    return reasons


def memory_reasons(code: Any, target: Target) -> list[str]:
    """List what code takes too much of."""
    reasons = []
    limit = target.architecture.shared_bytes
    if code.shared_bytes > limit:
        reasons.append(f"takes {code.shared_bytes} bytes of shared memory, {target.name} has {limit}")
    if code.tensor_memory > TENSOR_MEMORY_COLUMNS:
        reasons.append(f"takes {code.tensor_memory} columns of tensor memory, there are {TENSOR_MEMORY_COLUMNS}")
    return reasons


def read_code(compiled: CompiledKernel) -> Code:
    """Read a kernel that was compiled for any target. NVIDIA's local memory is spills: kernels ask for none."""
    shared, tensor_memory = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0
    if "amdgcn" in compiled.asm:
        assembly = compiled.asm["amdgcn"]
        registers, spills = (number_behind(rf"\.{name}:?\s+", assembly) for name in ("vgpr_count", "vgpr_spill_count"))
        return Code(registers, 4 * spills, shared)
    usage = read_binary("cuobjdump", compiled.asm["cubin"], "--dump-resource-usage")
    return Code(number_behind("REG:", usage), number_behind("STACK:", usage), shared, tensor_memory)


def read_binary(tool: str, cubin: bytes, *options: str) -> str:
    """Return what one of triton's tools for NVIDIA's binaries prints."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(_TOOLS / tool), *options, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def number_behind(pattern: str, text: str) -> int:
    found = re.search(rf"{pattern}(\d+)", text)
    if found is None:
        raise ValueError(f"machine code: expected a number behind {pattern!r}, got none")
    return int(found[1])


def compiler_versions(target: Target) -> dict[str, str]:
    """Name the versions that made the code of an entry."""
    versions = {"triton": triton.__version__}
    return versions | {"ptxas": ptxas_version(int(target.arch))} if target.backend == "cuda" else versions


class Compiler:
    """Examines configs in processes, each once for all lengths and for all cards of an architecture.

    examine   a function that processes can import
    """

    def __init__(self, target: Target, workers: int, examine: Examine = examine) -> None:
        self.target = target
        self._examine = examine
        self.examined: dict[tuple[str, Problem, TileConfig], Candidate] = {}
        self._pool = ProcessPoolExecutor(workers, get_context("spawn"), _quiet)

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)

    def examine(
        self, wanted: list[tuple[str, Problem, TileConfig]], progress: Progress | None = None
    ) -> list[Candidate]:
        wanted = [(kernel, replace(problem, short=False), config) for kernel, problem, config in wanted]
        new = [one for one in dict.fromkeys(wanted) if one not in self.examined]
        tasks = {self._pool.submit(self._examine, *one, self.target): one for one in new}
        for task in as_completed(tasks):
            self.examined[tasks[task]] = task.result()
            if progress:
                progress(1)
        return [self.examined[one] for one in wanted]


def _quiet() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a terminal sends Ctrl-C to all processes; this one ends silently
