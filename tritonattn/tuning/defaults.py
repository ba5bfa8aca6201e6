"""Configs where no table has one: chosen so that no loop spills, compiled and read, not timed.

tests/compiled compiles them for every target and reads the spills. Calls with many extras at once (dropout, a mask,
ranges and a softcap), and dropout on sm_90 at head dim 128, may spill a few registers.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from .config import (
    FIRST_KERNELS,
    SECOND_KERNELS,
    STREAMING_KERNELS,
    Problem,
    Target,
    TileConfig,
    holds_keys,
    holds_more,
    legal_reasons,
    may_use_descriptors,
)

# The forward in Gluon, which no default takes, in the tile that most calls may have.
GLUON = TileConfig(128, 64, 4, 2, descriptors=True, kernel="gluon")
# Passes without a head dim. A program of prefix_sums goes through a whole row in few steps, each as wide as registers
# allow. keys_seen tests block_m rows at once, and takes those that attend to a key of its block by block_n.
# argmax_of_ranges holds a tile of rows and keys where rows differ, and a vector of block_n keys where they do not.
# append_to_pages takes block_m heads, block_n keys at a time.
_STREAMING_TILES = {
    "append_to_pages": TileConfig(16, 64, 8, 1),
    "prefix_sums": TileConfig(4096, 4096, 8, 1),
    "row_bounds": TileConfig(1024, 1024, 4, 1),
    "keys_seen": TileConfig(1024, 64, 8, 1),
    "argmax_of_ranges": TileConfig(64, 128, 16, 1),
    "sum_of_splits": TileConfig(1024, 1024, 4, 1),
}


def default_config(kernel: str, problem: Problem, target: Target) -> TileConfig:
    """The config of a kernel where no table has one.

    An `invariant` problem's depends on head dims, dtype, target and the gradients asked for alone.
    """
    if problem.invariant:
        return _invariant_config(kernel, problem, target)
    width = min(size for size in (64, 128, 256, 512, 1024) if size >= problem.width)
    if kernel in STREAMING_KERNELS:
        rows = max(16, 8192 // max(width, 128))
        return _STREAMING_TILES.get(kernel, TileConfig(rows, rows, 4, 1))
    if kernel == "decode":
        return _decode_config(problem, width, target)
    if kernel in SECOND_KERNELS:
        return _second_config(kernel, problem, target, min(width, 256))
    if problem.dtype == torch.float32:
        return _float32_config(kernel, problem, target, width)
    config = _tiled_config(kernel, problem, target, width)
    if problem.block_table:
        return _with_page_numbers(kernel, config, problem, target)
    return _lighter(kernel, problem, width, config) if _takes_many_registers(kernel, problem) else config


def gluon_config(problem: Problem, target: Target) -> TileConfig | None:
    """The config of the forward in Gluon, which no default takes; None where it does not solve the problem."""
    for rows, keys in ((192, 128), (128, 128), (128, 64)):
        config = replace(GLUON, block_m=rows, block_n=keys)
        if not legal_reasons("forward", config, problem, target):
            return config
    return None


@functools.cache
def obstacle(
    head_dim: int, value_dim: int, dtype: torch.dtype, target: Target, kernels: tuple[str, ...] = FIRST_KERNELS
) -> str | None:
    """Name the kernel whose tiles a target's memory does not hold, and what they need; None if all fit."""
    problem = Problem(head_dim, value_dim, dtype)
    for kernel in kernels:
        if reasons := legal_reasons(kernel, default_config(kernel, problem, target), problem, target):
            return f"head_dim {max(head_dim, value_dim)} of {dtype}: {kernel}'s {reasons[0]}"
    return None


def _invariant_config(kernel: str, problem: Problem, target: Target) -> TileConfig:
    """The config for every mask and length. Above width 256 it is that of key ranges, which take registers there."""
    asked = {"query_scale_grad": problem.query_scale_grad, "aligned": problem.aligned}
    asked["key_ranges"] = problem.width > 256
    plain = Problem(problem.head_dim, problem.value_dim, problem.dtype, **asked)
    config = default_config(kernel, plain, target)
    return replace(config, descriptors=False) if problem.block_table or problem.eight_bit else config


def _float32_config(kernel: str, problem: Problem, target: Target, width: int) -> TileConfig:
    """The fp32 config; gradients that take many registers get the smallest tiles and one stage."""
    config = TileConfig(*target.architecture.family.float32[width])
    if kernel == "forward" or not _takes_many_registers(kernel, problem):
        return config
    return replace(config, block_m=16, block_n=16, num_stages=1)


def _second_config(kernel: str, problem: Problem, target: Target, width: int) -> TileConfig:
    """The config of tangents of all tensors, and of all gradients; the smallest tiles for what takes registers."""
    family = target.architecture.family
    if problem.dtype == torch.float32:
        return replace(TileConfig(*family.float32[width]), block_m=16, block_n=16, num_stages=1)
    config = TileConfig(*family.tiles[kernel][width])
    if not holds_more(problem):
        return config
    of_pairs = problem.bias or problem.relative_bias
    if width > 128 or target.backend == "hip" or (of_pairs and holds_keys(kernel)):
        return replace(config, block_m=16, block_n=16)
    held, streamed = ("block_n", "block_m") if holds_keys(kernel) else ("block_m", "block_n")
    return replace(config, num_warps=4, **{held: 16, streamed: 32})  # whose warps repeat no softmax


def _tiled_config(kernel: str, problem: Problem, target: Target, width: int) -> TileConfig:
    family = target.architecture.family
    described = family.described.get(kernel, {}).get(width)
    if described and may_use_descriptors(kernel, problem, target):
        return TileConfig(*described, descriptors=True)
    return TileConfig(*family.tiles[kernel][width])


def _with_page_numbers(kernel: str, config: TileConfig, problem: Problem, target: Target) -> TileConfig:
    """The same with one stage more for page numbers, where shared memory has room.

    Addresses of keys hold registers: with tensor memory, whose threads hold whole rows, extras take half of wide steps.
    """
    holds_more = problem.aux or problem.softcap or problem.key_scale or problem.key_bias
    if target.architecture.has_tensor_memory and problem.width >= 128 and holds_more:
        config = replace(config, block_n=config.block_n // 2)
    longer = replace(config, num_stages=config.num_stages + 1)
    is_legal = target.backend == "cuda" and not legal_reasons(kernel, longer, problem, target)
    return longer if is_legal else config


def _takes_many_registers(kernel: str, problem: Problem) -> bool:
    """True for kernels that hold a tile of a mask or bias, Philox's counters, or sums of a query scale's gradient.

    Above width 256 the tiles leave room for those sums, but not for ranges of rows.
    """
    holds_tile = problem.mask or problem.dropout or problem.bias or problem.relative_bias or problem.relative_scale
    if problem.width > 256:
        return holds_tile or problem.key_ranges
    return holds_tile or (kernel == "grad_query" and problem.query_scale_grad)


def _lighter(kernel: str, problem: Problem, width: int, config: TileConfig) -> TileConfig:
    """The same for more warps, or smaller.

    Steps are shorter; from width 256 on it is what is held that shrinks, but not from 128 rows, of which 8 warps have
    16 each: those that share rows compute each other's softmax. A mask and dropout at once take both from wide tiles.
    """
    if kernel == "grad_key_value" and width == 128 and problem.dropout and config.descriptors and config.num_warps == 4:
        # sm_90: other tiles spill, most where key heads are shared
        return replace(config, block_m=16, block_n=128, num_warps=8)
    held, streamed = ("block_n", "block_m") if kernel == "grad_key_value" else ("block_m", "block_n")
    rows = getattr(config, held)
    if config.num_warps == 4 and rows == 128:
        shortest = 64 if problem.relative_bias or problem.relative_scale else 128  # 128 keys spill 552 bytes on sm_90
        return replace(config, num_warps=8, block_n=min(config.block_n, shortest))
    halved = {held} if width >= 256 and 16 < rows < 128 else {streamed}
    if problem.mask and problem.dropout and width > (64 if kernel == "grad_key_value" else 128):
        halved |= {held}
    return replace(config, **{name: max(16, getattr(config, name) // 2) for name in halved})


def _decode_config(problem: Problem, width: int, target: Target) -> TileConfig:
    """The decode config: as many rows as a group fills and registers hold, and one stage more for page numbers.

    At width 1024 shared memory has no room for that stage. A bias with page numbers, an element per row and key, takes
    registers: there tiles of many rows have half as many keys.
    """
    family, is_nvidia = target.architecture.family, target.backend == "cuda"
    if problem.dtype == torch.float32:
        return TileConfig(16, max(16, 4096 // max(width, 128)), 8 if width > 64 and is_nvidia else 4, 2)
    rows = min(problem.packed_rows, 64, max(16, 8192 // width))
    block_n, warps, stages = family.decode[width]
    block_n = min(block_n, 2**18 // (rows * width))
    if problem.block_table and problem.key_bias and rows > 32:
        block_n = max(16, block_n // 2)
    if rows * width >= 8192:
        warps = family.many_rows_warps
    return TileConfig(rows, block_n, warps, stages + (problem.block_table and is_nvidia and width <= 512))
