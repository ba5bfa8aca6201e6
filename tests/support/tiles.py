"""Configs that compile quickly, where only the launch counts."""

from tritonattn.tuning.config import TILED_KERNELS, Problem, Target, TileConfig
from tritonattn.tuning.defaults import default_config


def quick_config(kernel: str, problem: Problem, target: Target) -> TileConfig:
    """Tiles of 16 x 16 and one warp; the default config of other kernels."""
    return TileConfig(16, 16, 1, 1) if kernel in TILED_KERNELS else default_config(kernel, problem, target)
