"""Kernels run on a GPU where there is one, else in Triton's interpreter, which TRITON_INTERPRET=1 asks for."""

from collections.abc import Iterator

import pytest
import torch

from tritonattn.backends.triton import launch
from tritonattn.tuning.config import TILED_KERNELS, TileConfig

if launch.interpreting:
    from tests.support.interpreter import quicken

    quicken()

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if launch.runs_on(DEVICE):
        return
    reason = pytest.mark.skip(reason="kernels need a GPU or TRITON_INTERPRET=1: `make test` runs them so")
    for item in items:
        if item.path.parent.name == "kernels":
            item.add_marker(reason)


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture(autouse=True)
def _short_blocks_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefix sums 256 at a time in the interpreter, which takes seconds for blocks of 4,096 that may begin again."""
    default = launch.config_for
    if launch.interpreting:
        short = {"prefix_sums": TileConfig(256, 256, 8, 1)}
        monkeypatch.setattr(launch, "config_for", lambda kernel, *of: short.get(kernel) or default(kernel, *of))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, TileConfig]]:
    """The kernels that have run, each with its config."""
    seen, run = [], launch.run

    def watch(kernel, grid, arguments, config):
        seen.append((kernel.__name__, config))
        run(kernel, grid, arguments, config)

    monkeypatch.setattr(launch, "run", watch)
    return seen


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 x 16 tiles, so that short sequences have inner blocks, edges and tails; quick in the interpreter."""
    default = launch.config_for

    def config(kernel, problem, target):
        return TileConfig(16, 16, 4, 1) if kernel in TILED_KERNELS else default(kernel, problem, target)

    monkeypatch.setattr(launch, "config_for", config)


@pytest.fixture
def new_memory_holds_nan() -> Iterator[None]:
    """torch.empty fills what it returns."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(deterministic)
