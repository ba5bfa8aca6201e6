"""The loop of a compiled kernel that the replay runs: its instructions with control codes, and what its PTX says."""

from __future__ import annotations

from typing import NamedTuple

from triton.compiler import CompiledKernel

from ..static.control_flow import Instruction, Listing, Span, innermost, loops, ptx_loops
from ..static.machine_code import MachineCode, MmaLoop, disassemble, instruction_class, read_machine_code
from .control import Control, parse_with_controls


class HotLoop(NamedTuple):
    """The loop over blocks without a mask.

    body          instructions of an iteration, in order
    labels        indices in the body of the instructions behind the labels inside it
    work          the loop's work, `MmaLoop`
    products      of the source, in an iteration: groups of wgmma that the PTX commits; 0 without wgmma
    request_bytes that an iteration asks of the TMA, of the whole program
    """

    body: list[tuple[Instruction, Control]]
    labels: dict[str, int]
    work: MmaLoop
    products: int
    request_bytes: int


def hot_loop(compiled: CompiledKernel) -> tuple[MachineCode, HotLoop]:
    """Read a kernel's code and find its loop over blocks without a mask."""
    code = read_machine_code(compiled)
    work = code.unmasked_loop
    if work is None or code.mma_loops is None:
        raise ValueError(f"kernel: expected a loop with tensor instructions, got none in {compiled.metadata.name}")
    listing, controls = parse_with_controls(disassemble(compiled.asm["cubin"]))
    number = code.mma_loops.index(work)
    body, labels = loop_body(listing, controls, tensor_spans(listing)[number])
    sources = ptx_loops(compiled.asm["ptx"])
    source = sources[min(number, len(sources) - 1)]  # where ptxas copies code, all loops have as many products
    products = sum(one.opcode.startswith("wgmma.commit_group") for one in source)
    expected = (one.operands for one in source if one.opcode.startswith("mbarrier.arrive.expect_tx"))
    requested = sum(int(operands.rpartition(",")[2]) for operands in expected)
    return code, HotLoop(body, labels, work, work.tiles * products, work.tiles * requested)


def tensor_spans(listing: Listing) -> list[Span]:
    """Find the loops that hold tensor instructions and no other such loop, in order."""
    tensor = {index for index, one in enumerate(listing.instructions) if instruction_class(one) == "tensor"}
    return innermost(loops(listing), tensor)


def loop_body(
    listing: Listing, controls: list[Control], span: Span
) -> tuple[list[tuple[Instruction, Control]], dict[str, int]]:
    """Return the instructions of a loop with their control codes, and the labels inside it as indices of the body."""
    position = {index: number for number, index in enumerate(span.body)}
    labels = {name: position[index] for name, index in listing.labels.items() if index in position}
    return [(listing.instructions[index], controls[index]) for index in span.body], labels
