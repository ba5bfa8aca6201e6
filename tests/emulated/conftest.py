"""The kernels, compiled for NVIDIA GPUs and executed on the CPU in tests/emulator, every access checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tritonattn.backends.triton import launch
from tritonattn.tuning.config import Target, TileConfig


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not launch.interpreting:
        return
    reason = pytest.mark.skip(reason="TRITON_INTERPRET=1 leaves nothing to compile")
    for item in items:
        if item.path.parent.name == "emulated":
            item.add_marker(reason)


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """emulate(gpu, tiles=None, kind=Executor): from now on kernels run in the emulator; returns the executor.

    New tensors are filled with NaN, so that a result that no kernel writes shows.
    """
    from .executor import GPU, Executor

    def install(gpu: GPU, tiles: TileConfig | None = None, kind: type[Executor] = Executor) -> Executor:
        executor = kind(gpu)
        monkeypatch.setattr(launch, "run", executor)
        monkeypatch.setattr(launch, "config_for", gpu.config(tiles))
        monkeypatch.setattr(Target, "of", lambda device: gpu.target)
        return executor

    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # also fills what torch.empty returns with NaN
    yield install
    torch.use_deterministic_algorithms(deterministic)
