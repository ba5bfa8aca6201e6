"""Clocks that an iteration of an MMA loop occupies each unit of an SM: a model from rates, not a measurement.

It leaves out latency, bank conflicts, dependencies and clock rates: it ranks and rejects configs, and does not
predict a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from .machine_code import MmaLoop

# The units of a bound, in the order in which they are shown.
UNITS = ("tensor", "exp", "fp32", "integer", "issue", "shared")


@dataclass(frozen=True)
class Rates:
    """Rates and sizes of one SM: tensor FLOPs (dense, 16-bit operands, fp32 sums) and lanes of each unit a clock.

    Every SM issues 4 warp instructions and moves 128 bytes of shared memory per clock; a packed fp32 instruction is
    issued once and takes two turns of the fp32 unit.
    """

    card: str
    tensor: int
    fp32: int
    shared_memory: int
    warps: int
    programs: int
    exp: int = 16
    integer: int = 64
    registers: int = 65536


# CUDA C++ Programming Guide, tables of arithmetic throughput and of compute capabilities; tensor: the card's dense bf16
# rate by its datasheet over SMs and boost clock. GeForce cards of 8.6 and 12.0 do half of it with fp32 sums.
RATES = {
    "80": Rates("A100", 2048, 64, 167936, 64, 32),
    "86": Rates("A10", 1024, 128, 102400, 48, 16),
    "89": Rates("L40S", 1024, 128, 102400, 48, 24),
    "90": Rates("H100", 4096, 128, 233472, 64, 32),
    "100": Rates("B200", 8192, 128, 233472, 64, 32),
    "120": Rates("RTX PRO 6000", 1024, 128, 102400, 48, 24),
}


@dataclass(frozen=True)
class AmdRates:
    """Rates of an AMD compute unit a clock: FLOPs, dense in 16 bits, exponentials, and bytes of LDS."""

    tensor: int
    exp: int
    shared: int


# CDNA 3 and 4 whitepapers.
AMD_RATES = {"gfx942": AmdRates(2048, 16, 128), "gfx950": AmdRates(4096, 32, 256)}


def programs_per_sm(rates: Rates, registers: int, shared_bytes: int, tensor_memory: int, warps: int) -> int:
    """Count the programs (thread blocks) that fit an SM at once.

    Registers are given out in units of 256 a warp, shared memory with 1 KiB on top for each program, and tensor memory
    in columns of 512.
    """
    a_warp = -(-registers * 32 // 256) * 256
    limits = [rates.registers // a_warp // warps, rates.warps // warps, rates.programs]
    limits.append(rates.shared_memory // (shared_bytes + 1024))
    if tensor_memory:
        limits.append(512 // tensor_memory)
    return min(limits)


def cycles(loop: MmaLoop, rates: Rates, warps: int) -> dict[str, float]:
    """Count the clocks that a program's iteration occupies each unit of an SM."""
    count = loop.instructions.get
    lanes = 32 * warps
    on_fp32 = count("fp32", 0) + loop.packed + count("multiply", 0)
    on_integer = count("compare", 0) + count("convert", 0) + count("integer", 0)
    return {
        "tensor": loop.flops / rates.tensor,
        "exp": count("exp", 0) * lanes / rates.exp,
        "fp32": on_fp32 * lanes / rates.fp32,
        "integer": on_integer * lanes / rates.integer,
        "issue": loop.total * warps / 4,
        "shared": loop.shared_bytes / 128,
    }


def turns(loop: MmaLoop, rates: Rates, warps: int) -> tuple[float, float]:
    """Count the clocks of a program's products, as of wgmma and tcgen05, and of the longest other unit.

    All warps of a program wait for such products at once. Unless a later block's are under way they take turns with
    the rest, and only another program fills the gaps.
    """
    units, operands = cycles(loop, rates, warps), loop.operand_bytes / 128
    products, moved = max(units.pop("tensor"), operands), units.pop("shared")
    return products, max(*units.values(), moved - operands)


def utilisation(bounds: dict[str, float], flops: float, rates: Rates) -> float:
    """Compute the share of the tensor unit's peak that `flops` reach if all units overlap perfectly."""
    return flops / rates.tensor / max(bounds.values())
