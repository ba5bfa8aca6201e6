"""Run compiled PTX on CPU tensors."""

from __future__ import annotations

import functools
import time
from collections.abc import Collection

import numpy as np
import torch

from .buffers import Buffer, lay_out_tensors, slot_address
from .errors import PTXError
from .machine import Machine
from .memory_code import PARAMETER_SYMBOL
from .parse import Parameter, parse
from .partitions import PartitionScheduler
from .program import Program
from .report import Report
from .scheduler import Scheduler
from .tensor_map import MAP_BYTES, host_map

_FLOATS = {2: np.float16, 4: np.float32, 8: np.float64}
DEFAULT_MAX_THREADS = 4096


def run(
    compiled,
    grid,
    arguments,
    *,
    names: list[str] | None = None,
    collect: bool = False,
    strict: bool = False,
    max_threads: int = DEFAULT_MAX_THREADS,
    policy: str = "round-robin",
    seed: int = 0,
    without: Collection[int] = (),
) -> Report:
    """Execute one of Triton's compiled kernels on CPU tensors, which it modifies, and report.

    arguments     tensors, ints, floats, None and TensorDescriptors in the order of the PTX parameters; Triton's
                  trailing scratch pointers may be left out: the kernel gets the scratch memory that it asks for
    names         of the arguments, for messages
    collect       note faults in the report and go on, with NaN for what was read, rather than raise PTXFault
    strict        raise PTXError at the first race or uninitialised read, rather than note it in the report
    max_threads   how many run in lock step: 2048 to 4096 are fastest
    policy, seed  of the order of warps where they are specialised: `partitions.PartitionScheduler`
    without       indices of instructions to be left out, of `synchronisation.left_out`

    Raises PTXFault at an access that is out of bounds or misaligned, PTXError for what the emulator does not support.
    """
    metadata = compiled.metadata
    return run_ptx(
        compiled.asm["ptx"],
        grid,
        arguments,
        shared=metadata.shared,
        num_warps=metadata.num_warps,
        scratch=getattr(metadata, "global_scratch_size", None),
        descriptors=getattr(metadata, "tensordesc_meta", None) or (),
        names=names,
        collect=collect,
        strict=strict,
        max_threads=max_threads,
        policy=policy,
        seed=seed,
        without=without,
    )


def run_ptx(
    ptx: str,
    grid,
    arguments,
    *,
    num_warps: int,
    shared: int = 0,
    scratch: int | None = None,
    descriptors=(),
    names: list[str] | None = None,
    collect: bool = False,
    strict: bool = False,
    max_threads: int = DEFAULT_MAX_THREADS,
    policy: str = "round-robin",
    seed: int = 0,
    without: Collection[int] = (),
) -> Report:
    """As `run`, from PTX text. shared: bytes of shared memory; scratch: bytes of global scratch per CTA (None: what the
    tensor maps need); descriptors: the layouts of the TensorDescriptors, Triton's `tensordesc_meta`."""
    started = time.monotonic()
    program = _program(ptx, frozenset(without))
    kernel = program.kernel
    threads = kernel.threads or 32 * num_warps
    if threads != 32 * num_warps:
        raise PTXError(f"num_warps: expected {threads // 32}, as the PTX says, got {num_warps}")
    grid = _three_axes(grid)
    machine = Machine(program.flow, grid, threads, shared, collect)
    machine.memo, machine.report.strict = program.memo, strict
    _Arguments(machine, descriptors).lay_out(list(arguments), names, scratch)
    machine.build_global()
    # CTAs of equal x run together: they mostly have equal trip counts.
    ctas = [(x, y, z) for x in range(grid[0]) for z in range(grid[2]) for y in range(grid[1])]
    batch = max(1, max_threads // threads)
    try:
        with np.errstate(all="ignore"):
            for first in range(0, len(ctas), batch):
                machine.start_batch(ctas[first : first + batch])
                if machine.specialised:
                    PartitionScheduler(machine, program, policy, seed).run()
                else:
                    Scheduler(machine, program).run()
                machine.check_nothing_in_flight()
    finally:
        machine.write_back()
    machine.report.ctas = len(ctas)
    machine.report.close()
    machine.report.seconds = time.monotonic() - started
    return machine.report


def _three_axes(grid) -> tuple[int, int, int]:
    """A grid of one to three axes, or the length of one, within CUDA's limits."""
    sizes = tuple(int(size) for size in (grid if hasattr(grid, "__len__") else (grid,)))
    limits = (2**31 - 1, 65535, 65535)
    if not 1 <= len(sizes) <= 3 or any(not 0 <= size <= limit for size, limit in zip(sizes, limits, strict=False)):
        raise PTXError(f"grid: expected one to three axes of at most {limits}, got {grid}")
    return (*sizes, 1, 1)[:3]


@functools.lru_cache(maxsize=16)
def _program(ptx: str, without: frozenset[int]) -> Program:
    if without:
        return _program(ptx, frozenset()).without(without)
    kernel = parse(ptx)
    constants = {name: slot_address(slot) for slot, name in enumerate(kernel.constants)}
    parameters = {parameter.name: MAP_BYTES * i for i, parameter in enumerate(kernel.parameters)}
    copy_of_parameters = {PARAMETER_SYMBOL: slot_address(len(constants))}
    return Program(kernel, kernel.locals | kernel.shared | parameters | constants | copy_of_parameters)


class _Arguments:
    """The arguments of one launch, as the machine reads them."""

    def __init__(self, machine: Machine, layouts) -> None:
        self.machine, self.kernel = machine, machine.kernel
        self.layouts = list(layouts)
        self.maps: dict[int, tuple] = {}  # parameter -> descriptor and layout

    def lay_out(self, given: list, names: list[str] | None, scratch: int | None) -> None:
        """Put tensors and constants into buffers, scalars and addresses into parameters."""
        buffers, parameters = self.machine.buffers, self.kernel.parameters
        buffers += [Buffer.plain(data, f"constant {name}") for name, data in self.kernel.constants.items()]
        copies = None
        if any(parameter.type == "b8" for parameter in parameters):  # descriptors of the host, passed by value
            copies = np.zeros(MAP_BYTES * len(parameters), np.uint8)
            buffers.append(Buffer.plain(copies, "kernel parameters"))
        arguments = self._expanded(given)
        missing = parameters[len(arguments) :]
        if len(arguments) > len(parameters) or not all(parameter.is_pointer for parameter in missing):
            raise PTXError(f"arguments: expected {len(parameters)}, got {len(arguments)}")
        arguments += [None] * len(missing)
        names = [*(names or []), *(parameter.name for parameter in parameters[len(names or []) :])]
        addresses = lay_out_tensors(arguments, names, buffers)
        if len(missing) == 2:  # of the two scratch pointers the first is global memory
            self._add_scratch(scratch, len(arguments) - 2, addresses)
        for position, (parameter, argument) in enumerate(zip(parameters, arguments, strict=True)):
            if position in self.maps:
                offset = MAP_BYTES * position
                copies[offset : offset + MAP_BYTES] = host_map(addresses[position], *self.maps[position])
            else:
                value = _value(position, parameter, argument, addresses)
                self.machine.parameter_bytes[parameter.name] = value

    def _expanded(self, given: list) -> list:
        """A TensorDescriptor is passed as its map, its sizes and its strides."""
        arguments = []
        for argument in given:
            if not hasattr(argument, "block_shape"):
                arguments.append(argument)
                continue
            if not self.layouts:
                raise PTXError("TensorDescriptor: expected its layout in descriptors=, got none")
            layout = self.layouts.pop(0)
            self.maps[len(arguments)] = (argument, layout)
            self.machine.descriptor_element_sizes.append(layout["elem_size"])
            arguments += [argument.base, *argument.shape, *argument.strides]
        return arguments

    def _add_scratch(self, scratch: int | None, position: int, addresses: dict[int, int]) -> None:
        if scratch is None:
            made = sum(one.opcode.startswith("tensormap.cp_fenceproxy") for one in self.kernel.instructions)
            scratch = MAP_BYTES * made
        size = scratch * int(np.prod(self.machine.grid))
        if size:
            addresses[position] = slot_address(len(self.machine.buffers))
            self.machine.buffers.append(Buffer.plain(np.full(size, 0xFF, np.uint8), "global scratch"))


def _value(position: int, parameter: Parameter, argument, addresses: dict[int, int]) -> bytes:
    """The bytes of a parameter."""
    if isinstance(argument, torch.Tensor) and parameter.size != 8:
        raise PTXError(f"parameter {position} ({parameter.name}): expected a scalar, got a tensor")
    if parameter.is_pointer and isinstance(argument, float):
        raise PTXError(f"parameter {position} ({parameter.name}): expected a tensor, got {argument}")
    if position in addresses:
        number = addresses[position]
    elif isinstance(argument, float):
        number = int.from_bytes(_FLOATS[parameter.size](argument).tobytes(), "little")
    else:
        number = int(argument or 0)
    return (number & ((1 << 8 * parameter.size) - 1)).to_bytes(parameter.size, "little")
