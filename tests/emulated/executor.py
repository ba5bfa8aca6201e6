"""A replacement for the function that launches kernels: compile for an NVIDIA GPU, run in the emulator, insist on a
clean report."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.emulator import Report, run
from tests.emulator.compile import compile_for
from tritonattn.tuning.config import TILED_KERNELS, Problem, Target, TileConfig
from tritonattn.tuning.defaults import default_config


class Executor:
    """Takes the place of `tritonattn.launch.run`; `reports`: kernel names with what the emulator found."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.reports: list[tuple[str, Report]] = []

    def __call__(self, kernel, grid, arguments, config) -> None:
        compiled = compile_for(
            kernel, arguments, num_warps=config.num_warps, num_stages=config.num_stages, capability=self.capability
        )  # fmt: skip
        report = run(compiled.kernel, grid, compiled.arguments, names=compiled.names)
        self.reports.append((report.name, report))
        assert report.ok, str(report)

    def config(self, tiles: TileConfig | None):
        """A `config_for` of this GPU: the same tiles for all tiled kernels, or the defaults."""
        target = Target("cuda", str(self.capability))

        def config_for(kernel: str, problem: Problem, _: Target) -> TileConfig:
            return tiles if tiles and kernel in TILED_KERNELS else default_config(kernel, problem, target)

        return config_for


def padded(tensor: Tensor) -> Tensor:
    """The same values with NaN behind the rows of every head and behind every row, where an overrun is reported.

    Rows stay a multiple of 16 bytes apart; vectors, such as scales, get a gap behind the last axis.
    """
    if tensor.dim() < 3:
        return tensor
    gap = (0, 16 // tensor.element_size(), 0, 2) if tensor.dim() > 3 else (0, 3)
    wide = torch.nn.functional.pad(tensor, gap, value=float("nan"))
    return wide[tuple(slice(size) for size in tensor.shape)]
