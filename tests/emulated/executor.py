"""A replacement for the function that launches kernels: compile for an NVIDIA GPU, run in the emulator, insist on a
clean report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.emulator import Report, run
from tests.emulator.compile import Compiled, compile_for
from tests.support.versions import OLDER_TRITON
from tritonattn.tuning.config import TILED_KERNELS, Problem, Target, TileConfig, legal_reasons
from tritonattn.tuning.defaults import default_config

GAP = 16  # elements: rows start where those of whole tensors could, so that the same code is compiled


@dataclass(frozen=True)
class GPU:
    """capability: 80 or 90; descriptors: whether kernels that can load by the tensor memory accelerator do."""

    capability: int
    descriptors: bool = False

    def __str__(self) -> str:
        return f"sm_{self.capability}{' descriptors' if self.descriptors else ''}"

    @property
    def target(self) -> Target:
        return Target("cuda", str(self.capability))

    def config(self, tiles: TileConfig | None):
        """A `launch.config_for`: the same tiles for all tiled kernels, or the default config."""

        def config_for(kernel: str, problem: Problem, target: Target) -> TileConfig:
            chosen = tiles if tiles and kernel in TILED_KERNELS else default_config(kernel, problem, target)
            asked = replace(chosen, descriptors=self.descriptors)
            return replace(asked, descriptors=False) if legal_reasons(kernel, asked, problem, target) else asked

        return config_for


GPUS = (GPU(80), GPU(90), GPU(90, descriptors=True))


class Executor:
    """Takes the place of `tritonattn.backends.triton.launch.run`; `reports`: what the emulator found at each launch."""

    def __init__(self, gpu: GPU) -> None:
        self.gpu = gpu
        self.reports: list[Report] = []

    def __call__(self, kernel, grid, arguments, config) -> None:
        compiled = self.compile(kernel, arguments, config)
        report = run(compiled.kernel, grid, compiled.arguments, names=compiled.names)
        self.reports.append(report)
        assert not any(map(_is_ours, report.problems())), str(report)

    def compile(self, kernel, arguments: dict[str, Any], config: TileConfig) -> Compiled:
        return compile_for(
            kernel,
            arguments,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            capability=self.gpu.capability,
        )

    @property
    def launched(self) -> list[str]:
        return [report.name for report in self.reports]

    def executed(self, kind: str) -> int:
        """Warp instructions of a class, such as "cp.async"."""
        return sum(report.counts.get(kind, 0) for report in self.reports)


def _is_ours(problem: dict) -> bool:
    """Whether a finding is about the kernels, not about the compiler.

    Older compilers read undefined registers for results that nobody uses, and leave out fences before wgmma.
    """
    of_compiler = ("uninitialised register", "async-proxy access", "no wgmma.fence before")
    return not OLDER_TRITON or not any(text in problem["message"] for text in of_compiler)


def padded(tensor: Tensor, gap: tuple[int, ...] = (0, GAP, 0, 2)) -> Tensor:
    """The same values in wider memory, where an overrun is reported: NaN (in a mask, True) between the rows and behind
    the last row of every head. gap: as `torch.nn.functional.pad` takes it."""
    wide = torch.nn.functional.pad(tensor, gap, value=True if tensor.dtype == torch.bool else float("nan"))
    return wide[tuple(slice(size) for size in tensor.shape)]


def padded_operands(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """q, k and v, and vectors such as scales, in wider memory."""
    return {name: padded(x) if name in ("q", "k", "v") else padded(x, (0, 3)) for name, x in tensors.items()}
