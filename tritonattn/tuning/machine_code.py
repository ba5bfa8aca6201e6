"""What a compiled kernel's machine code says without a GPU: registers, memory, and register spills in its loops."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.compiler import CompiledKernel

_TOOLS = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
_LABEL = re.compile(r"^(\.L_x?_?\w+):")
_MMA = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "DMMA")


@dataclass(frozen=True)
class MachineCode:
    """Bytes and counts a thread: spills are loads and stores of local memory inside loops, outer ones included.

    mma_loops counts the innermost loops with tensor instructions. AMD's compiler reports the spills of a whole kernel;
    there mma_loops is None.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    loop_spills: int
    mma_loops: int | None = None


def read_machine_code(compiled: CompiledKernel) -> MachineCode:
    """Read a kernel that was compiled for any target."""
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        assembly = compiled.asm["amdgcn"]
        names = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        registers, spills, scratch = (_number(rf"\.{name}:?\s+(\d+)", assembly) for name in names)
        return MachineCode(registers, scratch, shared, spills)
    usage, listing = _disassemble(compiled.asm["cubin"])
    registers, stack = (_number(rf"{name}:(\d+)", usage) for name in ("REG", "STACK"))
    loops = _loops(listing)
    spills = max((sum(op.startswith(("LDL", "STL")) for op in body) for body in loops), default=0)
    inner = sum(any(op.startswith(_MMA) for op in body) for body in loops)
    return MachineCode(registers, stack, shared, spills, inner)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"machine code: expected {pattern!r}, got none")
    return int(found[1])


def _disassemble(cubin: bytes) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return _output("cuobjdump", "--dump-resource-usage", str(path)), _output("nvdisasm", "-c", str(path))


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout


def _loops(listing: str) -> list[list[str]]:
    """The opcodes of every innermost loop: from a label to a branch back to it, with no such pair inside."""
    opcodes, labels, spans = [], {}, []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif instruction := _INSTRUCTION.match(line):
            target = re.search(r"\.L_x?_?\w+", instruction[2])
            if instruction[1].startswith("BRA") and target and target[0] in labels:
                spans.append((labels[target[0]], len(opcodes)))
            opcodes.append(instruction[1])
    inner = [
        (start, end)
        for start, end in spans
        if not any((start, end) != other and start <= other[0] and other[1] <= end for other in spans)
    ]
    return [opcodes[start : end + 1] for start, end in inner]
