"""Launches with every tensor between guards, and kernels with a given number of pipeline stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tritonattn.backends.triton import interpreter, launch
from tritonattn.tuning.config import TILED_KERNELS, Problem, Target, TileConfig, legal_reasons
from tritonattn.tuning.defaults import default_config

_GUARD = 1 << 13  # elements on either side
_ALIGNMENT = 256  # bytes, of torch's allocators; copies keep an address modulo this


class Executor:
    """A launch function that counts, and that with `guards` hands kernels copies of their tensors between guards.

    A guard holds NaN, or large integers. Raises AssertionError where a kernel writes one.
    """

    def __init__(self, run: Callable[..., None], guards: bool) -> None:
        self.run, self.guards, self.launches = run, guards, 0

    def __call__(self, kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], config: TileConfig) -> None:
        self.launches += 1
        if not self.guards:
            return self.run(kernel, grid, arguments, config)
        copies: list[tuple[str, _Copy]] = []

        def guarded(name: str, value: Any) -> Any:
            def copied(tensor: Tensor) -> Tensor:
                copies.append((name, _Copy(tensor)))
                return copies[-1][1].inner

            if hasattr(value, "base"):  # a TensorDescriptor
                return replace(value, base=copied(value.base))
            return interpreter.map_tensors(copied, value)

        self.run(kernel, grid, {name: guarded(name, value) for name, value in arguments.items()}, config)
        for name, copy in copies:
            assert copy.guards_hold(), f"{kernel.__name__}: wrote out of the bounds of {name}"
            copy.write_back()


class _Copy:
    """A copy of a tensor, with the gaps between its rows, in the middle of a guarded buffer."""

    def __init__(self, tensor: Tensor) -> None:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.original = tensor.as_strided((extent if tensor.numel() else 0,), (1,))
        offset = tensor.data_ptr() % _ALIGNMENT // tensor.element_size()
        poison = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 3
        size = self.original.numel()
        self.buffer = torch.full((size + 2 * _GUARD + offset,), poison, dtype=tensor.dtype, device=tensor.device)
        self.before, self.flat, self.after = self.buffer.split((_GUARD + offset, size, _GUARD))
        self.flat.copy_(self.original)
        self.inner = self.flat.as_strided(tensor.shape, tensor.stride())
        self.kept = [guard.clone() for guard in (self.before, self.after)]

    def guards_hold(self) -> bool:
        return all(map(_same_bits, (self.before, self.after), self.kept))

    def write_back(self) -> None:
        """Copy the kernel's writes back; a tensor that was only read stays untouched, since autograd tracks writes."""
        if not _same_bits(self.flat, self.original):
            self.original.copy_(self.flat)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def small_tiles(kernel: str, problem: Problem, target: Target) -> TileConfig:
    """Choose tiles of 16 x 16, which an interpreter computes quickly, and which short sequences fill."""
    config = default_config(kernel, problem, target)
    return replace(config, block_m=16, block_n=16, num_stages=1) if kernel in TILED_KERNELS else config


def _with_stages(stages: int) -> Callable[[str, Problem, Target], TileConfig]:
    def config(kernel: str, problem: Problem, target: Target) -> TileConfig:
        default = default_config(kernel, problem, target)
        asked = replace(default, num_stages=stages)
        fits = kernel in TILED_KERNELS and not legal_reasons(kernel, asked, problem, target)
        return asked if fits else default

    return config


# One function for each number, since launch plans are kept by the function that chose their config.
CONFIGS = {stages: _with_stages(stages) for stages in (2, 3, 4)} | {None: default_config}


@contextmanager
def soaking(guards: bool) -> Iterator[Executor]:
    """Launch through an Executor inside the context; with guards, fresh memory is NaN."""
    executor = Executor(launch.run, guards)
    kept = launch.run, launch.config_for, torch.are_deterministic_algorithms_enabled()
    launch.run = executor
    torch.use_deterministic_algorithms(guards, warn_only=True)  # fills torch.empty
    try:
        yield executor
    finally:
        launch.run, launch.config_for, deterministic = kept
        torch.use_deterministic_algorithms(deterministic)
