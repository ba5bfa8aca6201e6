"""The device of the emulated tests: launches that reached the stub driver run in the emulator, with a clean report."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from ptx_emulator import Report, run
from torch import Tensor

from tests.stub import Launched
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

    def config(self, tiles: TileConfig | None):
        """A `launch.config_for`: the same tiles for all tiled kernels, or the default config."""

        def config_for(kernel: str, problem: Problem, target: Target) -> TileConfig:
            chosen = tiles if tiles and kernel in TILED_KERNELS else default_config(kernel, problem, target)
            asked = replace(chosen, descriptors=self.descriptors)
            return replace(asked, descriptors=False) if legal_reasons(kernel, asked, problem, target) else asked

        return config_for


class Executor:
    """Runs launches in the emulator; `reports`: what it found at each."""

    def __init__(self) -> None:
        self.reports: list[Report] = []

    def __call__(self, launched: Launched) -> None:
        report = run(launched.kernel, launched.grid, launched.arguments, names=launched.names)
        self.reports.append(report)
        assert not any(map(is_ours, report.problems())), str(report)

    @property
    def launched(self) -> list[str]:
        return [report.name for report in self.reports]

    def executed(self, class_name: str) -> int:
        """Warp instructions of a class, such as "cp.async"."""
        return sum(report.counts.get(class_name, 0) for report in self.reports)


def is_ours(problem: dict) -> bool:
    """True where a finding is about the kernels, not about the compiler.

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
