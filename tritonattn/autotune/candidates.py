"""The configs worth compiling for a kernel: around the defaults, in the ranges of flash attention."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import product

from ..tuning.config import (
    REGISTERS,
    SECOND_KERNELS,
    SHARES,
    Problem,
    Target,
    TileConfig,
    holds_keys,
    legal_reasons,
    may_specialise,
    may_use_descriptors,
)
from ..tuning.defaults import GLUON, default_config
from ..tuning.lookup import config_for
from ..tuning.table import EntryKey, Exact

_WAVES_PER_EU = (0, 1, 2, 3)
# Values of a config's SHARES that are timed, the default first.
_L2_PERCENT = (100, 25, 50, 200, 400)
_SPLIT_BLOCKS = (4, 8, 16, 32, 64)
# Tiles of logits, their gradients and tangents that registers hold at once, and fp32 sums of held rows.
_HELD = {
    "forward": (1, 1),
    "grad_query": (2, 1),
    "grad_key_value": (2, 2),
    "tangent": (3, 1),
    "grad_query_second": (6, 2),
    "grad_key_value_second": (7, 4),
}


def candidates(kernel: str, problem: Problem, target: Target) -> list[TileConfig]:
    """List legal configs, the default first, each once; with descriptors and OPTIONS where the hardware has them."""
    ranges = target.architecture.family.ranges[problem.width > 128][kernel]
    if kernel == "decode":  # as many rows as a group fills
        ranges = (tuple(rows for rows in (16, 32, 64) if rows <= problem.packed_rows), *ranges[1:])
    loads = (True, False) if may_use_descriptors(kernel, problem, target) else (False,)
    found = [TileConfig(*tiles, descriptors=described) for described in loads for tiles in product(*ranges)]
    if target.backend == "hip":
        found = [replace(one, waves_per_eu=waves) for waves in _WAVES_PER_EU for one in found]
    if may_specialise(kernel, problem, target):
        found += [replace(one, warp_specialize=True) for one in found if one.descriptors]
    default = default_config(kernel, problem, target)
    return [default, *(one for one in found if one != default and _is_sensible(kernel, one, problem, target))]


def in_gluon(kernel: str, problem: Problem, target: Target) -> list[TileConfig]:
    """List the legal configs of the kernel in Gluon, which only times of a card may choose."""
    tiles = product(REGISTERS, (64, 128), (2, 3))
    found = [replace(GLUON, block_m=m, block_n=n, num_stages=stages) for m, n, stages in tiles]
    return [one for one in found if not legal_reasons(kernel, one, problem, target)]


def neighbours(kernel: str, problem: Problem, target: Target) -> list[TileConfig]:
    """List the config in use, and the candidates that differ from it in one field, or in descriptors and stages."""
    in_use = replace(config_for(kernel, problem, target), **SHARES)

    def is_near(one: TileConfig) -> bool:
        differing = {field.name for field in fields(one) if getattr(one, field.name) != getattr(in_use, field.name)}
        return len(differing) == 1 or differing == {"descriptors", "num_stages"}

    return [in_use, *filter(is_near, candidates(kernel, problem, target))]


def shares(key: EntryKey, config: TileConfig) -> list[TileConfig]:
    """List the config with each value of its SHARES that is timed, the default first; empty where none is.

    Splits are timed for recorded calls alone: a key's calls have any batch, and a small one needs the most splits.
    """
    config = replace(config, **SHARES)
    if key.kernel != "decode":
        return [replace(config, l2_percent=percent) for percent in _L2_PERCENT]
    return [replace(config, split_blocks=blocks) for blocks in _SPLIT_BLOCKS] if isinstance(key, Exact) else []


def tiles(config: TileConfig) -> tuple[int, int, int]:
    """Return all of a config but its stages, which say how far ahead it asks for loads."""
    return config.block_m, config.block_n, config.num_warps


def _is_sensible(kernel: str, config: TileConfig, problem: Problem, target: Target) -> bool:
    """True for a legal config whose fp32 sums and logits its warps' registers (255 a thread) can hold.

    With wgmma, four warps multiply 64 rows: a config also needs rows for all its warps, which else repeat one another's
    work or leave wgmma to slower instructions. grad_key_value of wide heads has no registers for as many. Nor have
    passes with derivatives beyond the first, whose four warps may share rows.
    """
    if legal_reasons(kernel, config, problem, target):
        return False
    if kernel == "decode":
        return True
    of_keys = holds_keys(kernel)
    held = config.block_n if of_keys else config.block_m
    has_few_rows = held < 16 * config.num_warps
    if kernel in SECOND_KERNELS:
        if has_few_rows and (config.num_warps != 4 or config.block_m * config.block_n < 512):
            return False
    elif target.architecture.has_wgmma and has_few_rows and not (of_keys and problem.width > 128):
        return False
    tiles, of_width = _HELD[kernel]
    sums = 0 if target.architecture.has_tensor_memory else held * problem.width * of_width
    in_registers = tiles * config.block_m * config.block_n + sums
    return in_registers <= 208 * target.architecture.warp_size * config.num_warps
