"""The kernels, compiled and launched by Triton for GPUs that a stub driver shows, and executed in tests/emulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch

from tests.support.versions import skip_without_stub
from tritonattn.backends.triton import launch
from tritonattn.tuning.config import TileConfig


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """emulate(gpu, tiles=None, executor=Executor): from now on kernels run in the emulator; returns the executor.

    New tensors are filled with NaN, so that a result that no kernel writes shows.
    """
    skip_without_stub()
    from tests.stub import installed

    from .executor import GPU, Executor

    deterministic = torch.are_deterministic_algorithms_enabled()
    with ExitStack() as stack:

        def install(gpu: GPU, tiles: TileConfig | None = None, executor: type[Executor] = Executor) -> Executor:
            running = executor()
            monkeypatch.setattr(launch, "config_for", gpu.config(tiles))
            stack.enter_context(installed().active(gpu.capability, running))
            return running

        torch.use_deterministic_algorithms(True)  # also fills what torch.empty returns with NaN
        yield install
        torch.use_deterministic_algorithms(deterministic)
