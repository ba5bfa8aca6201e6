"""The replay of a compiled kernel's loop: share of the tensor rate, and what its warps wait for.

Modelled. Memory behind L2, the instruction cache, bank conflicts and power are not in it. Published times on an H100
are met as `times` says: loops take 1.085 times as long as replayed, and shares may be off by 15%. No other card was
compared.
"""

from __future__ import annotations

from dataclasses import dataclass

from triton.compiler import CompiledKernel

from tritonattn.tuning import Target
from tritonattn.tuning.config import TileConfig

from ..static.machine_code import MachineCode
from ..static.model import RATES, programs_per_sm
from .exposed import bounded_clocks, flight
from .loops import HotLoop, hot_loop
from .operations import Operation, of_consumer, operations
from .parameters import PARAMETERS, Parameters
from .scheduler import Scheduler, Timeline, Warps

# Iterations that are replayed, and those of them that come before the figures.
ITERATIONS, WARM = 16, 6
# More polls than a replay has: their loads are there.
EVERY_POLL = 10**6


@dataclass(frozen=True)
class Replay:
    """Figures of a kernel's loop over blocks without a mask; modelled but for the counts.

    share              of the processor's tensor rate; where units are bounded, not replayed, and one program fits a
                       processor, its products (of tcgen05) and the rest are taken to take turns
    clocks             of an iteration of a program, while `programs` run
    waits              shares of a warp's time by reason; loads alone where the target's units are bounded, not replayed
                       loads: data asked for is not there. products: results of wgmma. wgmma: their queue is full.
                       barrier: of the program. scoreboard: an earlier result. fixed latency: stall counts. registers:
                       ports of the register file. fp32, integer, exp, mma, memory, uniform: the unit is taken.
                       issue: another warp issues
    flops              of an iteration of a program
    programs           that a processor holds at once; 0 where one does not fit, and the figures are of one that did
    products           wgmma groups of the source in an iteration
    product_waits      waits for them; more of them than products: ptxas serialised the products
    groups_in_flight   cp.async groups that may be outstanding behind the loop's first wait for them; None without
    awaits_last        whether an iteration waits for what the one before it asked for, or it itself
    overlapped         the share if products and the rest overlap; None where that is replayed
    """

    share: float
    clocks: float
    waits: dict[str, float]
    flops: float
    registers: int
    programs: int
    products: int
    product_waits: int
    groups_in_flight: int | None
    awaits_last: bool
    overlapped: float | None = None

    @property
    def is_serialised(self) -> bool:
        return self.product_waits > self.products


def replay(compiled: CompiledKernel, config: TileConfig, target: Target) -> Replay:
    """Replay a kernel that was compiled for sm_80, 86, 89 or 90; bound that for another of RATES, sm_100 and 120.

    Raises ValueError for other targets and for kernels without a loop of tensor instructions.

    >>> import torch
    >>> from tritonattn.tuning import Problem, Target, compile_kernel, default_config
    >>> target, problem = Target.parse("sm_90"), Problem(64, 64, torch.bfloat16)
    >>> config = default_config("forward", problem, target)
    >>> replay(compile_kernel("forward", problem, config, target), config, target).is_serialised
    False
    """
    if target.arch not in RATES or target.backend != "cuda":
        raise ValueError(f"target: expected one of sm_{', sm_'.join(RATES)}, got {target.name}")
    code, loop = hot_loop(compiled)
    rates, parameters = RATES[target.arch], PARAMETERS.get(target.arch, PARAMETERS["90"])
    path = operations(loop.body, loop.labels, parameters)
    if config.kernel == "gluon":
        return _replay_of_consumers(compiled, code, loop, path, config, parameters)
    warps = config.num_warps
    fitting = programs_per_sm(rates, code.registers, code.shared_bytes, code.tensor_memory, warps)
    programs = max(1, fitting)
    ahead = flight(path, config.num_stages)
    least = programs * loop.work.flops / rates.tensor
    overlapped = None
    if target.arch in PARAMETERS:
        clocks, waits = _replayed(loop, path, config, programs, parameters)
    else:
        bounds = bounded_clocks(loop, path, ahead, parameters, rates, warps, programs)
        clocks, waits = bounds.clocks, {"loads": bounds.exposed / bounds.clocks}
        overlapped = least / bounds.overlapped
    return Replay(
        least / clocks,
        clocks / loop.work.tiles,
        waits,
        loop.work.flops / loop.work.tiles,
        code.registers,
        fitting,
        loop.products,
        sum(one.act == "product wait" for one in path),
        ahead.groups,
        ahead.iterations <= 1,
        overlapped,
    )


def _replay_of_consumers(
    compiled: CompiledKernel,
    code: MachineCode,
    loop: HotLoop,
    path: list[Operation],
    config: TileConfig,
    parameters: Parameters,
) -> Replay:
    """Replay the warpgroups of a program that consume, all loads taken to be there in time; two of them take turns."""
    consumers = config.block_m // 64
    takes_turns = consumers == 2
    path = of_consumer(path, takes_turns, parameters)
    warps = Warps(1, consumers, EVERY_POLL) if takes_turns else Warps(consumers, 1, EVERY_POLL)
    clocks, waits = Scheduler(path, warps, parameters).run(ITERATIONS, WARM)
    all_warps = compiled.metadata.num_warps
    flops = loop.work.flops * 4 * consumers / all_warps  # it was counted for the warps that load, too
    rates = parameters.rates
    programs = programs_per_sm(rates, code.registers, code.shared_bytes, code.tensor_memory, all_warps)
    product_waits = sum(one.act == "product wait" for one in path)
    share, tiles = flops / rates.tensor / clocks, loop.work.tiles
    found = (share, clocks / tiles, waits, flops / tiles, code.registers, programs)
    return Replay(*found, loop.products, product_waits, None, False)


def _replayed(
    loop: HotLoop, path: list[Operation], config: TileConfig, programs: int, parameters: Parameters
) -> Timeline:
    """Replay as many programs as a processor holds, of which a scheduler has a quarter of the warps."""
    each = max(1, config.num_warps // 4)
    requests, polls = (sum(one.act == act for one in path) for act in ("request", "poll"))
    warps = Warps(
        -(-programs * config.num_warps // (4 * each)),
        each,
        polls // loop.work.tiles * (config.num_stages - 1),
        loop.request_bytes / max(1, requests),
    )
    return Scheduler(path, warps, parameters).run(ITERATIONS, WARM)
