"""The static gate: conditions on machine code, and modelled clocks of configs whose code passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from triton.compiler import CompiledKernel

from tritonattn.autotune.gate import Candidate, compiled_candidate, memory_reasons
from tritonattn.backends.triton.grids import splits_of_capacity
from tritonattn.tuning.config import Problem, Target, TileConfig, holds_keys, streamed_width
from tritonattn.tuning.gpus import GPU

from .machine_code import MachineCode, MmaLoop, flops_per_logit, read_machine_code
from .model import AMD_RATES, RATES, cycles, programs_per_sm, turns

# Bytes that the L2 cache gives an SM a clock: 5120 for the 108 of an A100 (NVIDIA A100 whitepaper); taken for all.
_L2_BYTES = 48
# Exponentials and reciprocals a logit where a softcap's tanh takes one of each.
_OF_A_SOFTCAP = 3
# Approximate clocks until a load from memory arrives.
_LATENCY = 600
# Instructions that access local memory, as a share of a loop's: of fewer the price is in the model.
_MOST_LOCAL = 0.02


@dataclass(frozen=True)
class Latency:
    """A model's view of the loop over blocks without a mask, with latency.

    share        of the processor's tensor rate
    clocks       of an iteration of a program while `programs` run, or None where latency was not replayed
    programs     that a processor holds at once
    awaits_last  whether an iteration waits for what the one before it asked for
    """

    share: float
    clocks: float | None
    programs: int
    awaits_last: bool


LatencyModel = Callable[[CompiledKernel, TileConfig, Target], Latency]


@dataclass(frozen=True)
class Judged(Candidate):
    """A config, its `MachineCode`, the reasons to refuse it, and a model's view of it."""

    latency: Latency | None = None

    def details(self) -> dict[str, Any]:
        share = {} if self.latency is None else {"modelled_share": round(self.latency.share, 3)}
        return super().details() | share


def examine(
    kernel: str, problem: Problem, config: TileConfig, target: Target, model: LatencyModel | None = None
) -> Judged:
    """Compile a config, hold it to the gate, and ask a model of its latency if there is one."""

    def read(compiled: CompiledKernel) -> Judged:
        code = read_machine_code(compiled)
        reasons = gate_reasons(kernel, problem, config, target, code)
        latency = model(compiled, config, target) if model and code.unmasked_loop and kernel != "decode" else None
        return Judged(config, code, tuple(reasons), latency)

    found = compiled_candidate(kernel, problem, config, target, read)
    return found if isinstance(found, Judged) else Judged(config, None, found.reasons)


def gate_reasons(kernel: str, problem: Problem, config: TileConfig, target: Target, code: MachineCode) -> list[str]:
    """List the reasons to refuse code; an empty list lets it be timed."""
    reasons = []
    if code.spill_bytes and _local_share(code) > _MOST_LOCAL:
        reasons.append(f"spills {code.spill_bytes} bytes a thread in a loop")
    reasons += memory_reasons(code, target)
    if code.mma_loops is None:  # AMD
        return reasons
    loop = code.unmasked_loop
    if loop is None:
        return [*reasons, "has no loop with tensor instructions"]
    if loop.product_waits > loop.products > 0:
        reasons.append(f"waits {loop.product_waits} times for {loop.products} products: ptxas serialised them")
    softmaxes = _softmaxes(kernel, config, loop) / (_OF_A_SOFTCAP if problem.softcap else 1)
    if kernel != "decode" and softmaxes > 1.1:
        reasons.append(f"computes {softmaxes:.2f} exponentials a logit: warps repeat each other's softmax")
    return reasons


def _local_share(code: MachineCode) -> float:
    """Share of instructions that access local memory, in the loop of tensor instructions that has the most; else 1."""
    return max((loop.instructions.get("local", 0) / loop.total for loop in code.mma_loops or ()), default=1.0)


def _softmaxes(kernel: str, config: TileConfig, loop: MmaLoop) -> float:
    """Count exponentials per logit, without those that correct earlier sums, at most 4 lanes of every warp per row."""
    rows = 4 * config.num_warps / config.block_n if kernel == "forward" else 0
    tile = loop.tiles * config.block_m * config.block_n
    return loop.instructions.get("exp", 0) * 32 * config.num_warps / tile - rows


def modelled_clocks(kernel: str, problem: Problem, candidate: Judged, gpu: GPU) -> float:
    """Model the clocks of a representative call on a GPU from the rates of its units, for ranking only.

    A processor holds some programs at once. Their units overlap as far as warps hide one another: an iteration takes
    its longest unit's time and, of the others' time, the share that one of a scheduler's warps leaves exposed, or one
    of the programs where all warps of a program wait for its products (wgmma, tcgen05); loads are exposed as far as
    the iterations between request and wait are shorter. A replay of the loop stands for all that.
    AMD's loops are not read: their units follow from the tiles.
    Decoding has another model, of memory.
    """
    config, code, target, processors = candidate.config, candidate.code, gpu.target, gpu.processors
    assert code is not None
    if kernel == "decode":
        return _clocks_of_decode(problem, config, code, gpu)
    programs, iterations = _work(kernel, problem, config)
    rates, loop, resident = RATES.get(target.arch), code.unmasked_loop, _resident(config, code, target)
    waves = -(-programs // (processors * resident))
    if candidate.latency is not None and candidate.latency.clocks is not None:
        return waves * iterations * candidate.latency.clocks
    of_l2 = _streamed_bytes(kernel, problem, config) / _L2_BYTES
    hiding = resident * config.num_warps / 4
    if rates and loop:
        tiles, units, in_turn = loop.tiles, cycles(loop, rates, config.num_warps), ("tensor", "exp", "issue")
    else:
        tiles, units, in_turn = 1, _amd_cycles(kernel, problem, config, target), ("tensor", "exp", "shared")
    taken = sum(units[name] for name in in_turn)
    if rates and loop and loop.operand_bytes:  # all warps of a program wait for its products
        taken, hiding = sum(turns(loop, rates, config.num_warps)), resident
    longest = max(*units.values(), tiles * of_l2)
    exposed = (taken - longest) / max(1.0, hiding)
    ahead = max(0, config.num_stages - 1 - config.descriptors)  # the TMA is asked at an iteration's end
    waiting = max(0.0, tiles * (_LATENCY + of_l2) - ahead * resident * longest) / resident
    return waves * resident * iterations / tiles * (longest + max(exposed, 0.0) + waiting)


def _resident(config: TileConfig, code: MachineCode, target: Target) -> int:
    """Count the programs that a processor holds at once; AMD's have four units of up to 8 waves, of 512 registers."""
    if rates := RATES.get(target.arch):
        fitting = programs_per_sm(rates, code.registers, code.shared_bytes, code.tensor_memory, config.num_warps)
    else:
        waves = 4 * min(8, 512 // max(code.registers, 1))
        fitting = min(waves // config.num_warps, target.architecture.shared_bytes // max(code.shared_bytes, 1))
    return max(1, fitting)


def _amd_cycles(kernel: str, problem: Problem, config: TileConfig, target: Target) -> dict[str, float]:
    """Count the clocks that a program's iteration occupies units of AMD, whose loops are not read.

    Warps with less than 16 rows each, those of a matrix instruction, repeat one another's work. Each warp reads every
    streamed tile from LDS, once for each product.
    """
    held, streamed = config.block_m, config.block_n
    if holds_keys(kernel):
        held, streamed = streamed, held
    flops = flops_per_logit(kernel, problem)
    logits, rates = streamed * max(held, 16 * config.num_warps), AMD_RATES[target.arch]
    return {
        "tensor": logits * flops / rates.tensor,
        "exp": logits / rates.exp,
        "shared": config.num_warps * streamed * flops / 2 * problem.dtype.itemsize / rates.shared,
    }


def _clocks_of_decode(problem: Problem, config: TileConfig, code: MachineCode, gpu: GPU) -> float:
    """Model decode's clocks: its bytes at the memory's rate, and what of their latency no other load in flight hides.

    A block takes the longest of memory and units, and max(0, latency + bytes / rate - clocks between request and wait),
    which programs on one processor share; of a program's first block only the other programs' loads hide some. By
    Little's law nothing is exposed once latency * rate bytes are in flight: a block for each stage ahead and program.
    """
    programs, iterations = _work("decode", problem, config)
    rates, loop = RATES.get(gpu.target.arch), code.unmasked_loop
    tensor = (rates or AMD_RATES.get(gpu.target.arch, AMD_RATES["gfx942"])).tensor
    of_memory = _streamed_bytes("decode", problem, config) * gpu.flops_per_byte / tensor
    turns = -(-programs // gpu.processors)
    resident = min(_resident(config, code, gpu.target), turns)
    units = cycles(loop, rates, config.num_warps).values() if rates and loop else ()
    busy = max(of_memory, *(unit / loop.tiles for unit in units)) if loop else of_memory
    load, ahead = _LATENCY + of_memory, config.num_stages - 1
    exposed = max(0.0, load - ahead * resident * busy) / resident
    first = max(0.0, load - max(1, ahead) * (resident - 1) * busy) / resident
    return turns * (iterations * (busy + exposed) + first)


def _streamed_bytes(kernel: str, problem: Problem, config: TileConfig) -> int:
    """Count the bytes that an iteration loads: keys and values, or queries and the output's gradient."""
    rows = config.block_m if holds_keys(kernel) else config.block_n
    return rows * streamed_width(kernel, problem) * problem.dtype.itemsize


def _work(kernel: str, problem: Problem, config: TileConfig) -> tuple[int, int]:
    """Count programs, and iterations of each, of 128 heads of 512 tokens, or of 8192."""
    length = 512 if problem.short else 8192
    held, streamed = config.block_m, config.block_n
    if holds_keys(kernel):
        held, streamed = streamed, held
    if kernel == "decode":  # 32 sequences with 8 key heads
        splits = splits_of_capacity(length, config)
        return splits * 32 * 8 * -(-problem.packed_rows // held), -(-length // (splits * streamed))
    return 128 * -(-length // held), length // streamed
