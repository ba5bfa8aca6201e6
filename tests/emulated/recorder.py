"""Launches that are kept, to run again without some of their kernel's instructions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from ptx_emulator import PTXError, Report, run
from torch import Tensor

from tests.stub import Launched

from .executor import Executor


@dataclass(frozen=True)
class Launch:
    """A launch, with copies of what its arguments held before, and its report."""

    launched: Launched
    arguments: list
    report: Report

    @property
    def name(self) -> str:
        return self.launched.name

    @property
    def ptx(self) -> str:
        return self.launched.kernel.asm["ptx"]

    def executed(self) -> set[int]:
        """The indices of the instructions that some warp executed."""
        flow, executions = self.report.flow, self.report.executions
        blocks = [block for block, count in zip(flow.blocks, executions, strict=True) if count]
        return {index for block in blocks for index in range(block.start, block.end)}

    def is_clean(self, without: tuple[int, ...]) -> bool:
        """True where nothing is reported when the kernel runs without some instructions."""
        kernel, grid, _, names = self.launched
        try:
            run(kernel, grid, copied(self.arguments), names=names, strict=True, without=without)
        except PTXError:
            return False
        return True


class Recorder(Executor):
    """An executor that keeps every launch."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __call__(self, launched: Launched) -> None:
        before = copied(launched.arguments)
        super().__call__(launched)
        self.launches.append(Launch(launched, before, self.reports[-1]))


def copied(arguments: list) -> list:
    """Copies of tensors and of tensors behind descriptors; views of one storage share the copy."""
    storages: dict[int, Any] = {}

    def copy(argument: Any) -> Any:
        if hasattr(argument, "base"):  # a TensorDescriptor
            return replace(argument, base=copy(argument.base))
        if not isinstance(argument, Tensor):
            return argument
        storage = argument.untyped_storage()
        kept = storages.setdefault(storage.data_ptr(), None) or storage.clone()
        storages[storage.data_ptr()] = kept
        empty = torch.empty(0, dtype=argument.dtype)
        return empty.set_(kept, argument.storage_offset(), argument.shape, argument.stride())

    return [copy(argument) for argument in arguments]
