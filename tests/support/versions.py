"""The installed versions of torch and triton, and tests that need newer ones, or another machine."""

from importlib.metadata import PackageNotFoundError, version

import pytest
import torch


def _release(package: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, version(package).split(".")[:2]))
    except PackageNotFoundError:
        return ()


TORCH = _release("torch")
TRITON = _release("triton")
OLDER_TRITON = TRITON < (3, 9)  # instructions are counted in the code of 3.9


def skip_without_stub() -> None:
    """Skip a test of compiled kernels on the stub of NVIDIA's driver, where that cannot stand in."""
    from tritonattn.backends.triton import launch

    if launch.interpreting:
        pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile")
    if torch.cuda.is_available():
        pytest.skip("NVIDIA's driver is loaded: tests/kernels run on the GPU")
