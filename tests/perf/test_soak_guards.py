"""Launches between guards: what a kernel may write comes back, what it may not is found."""

import pytest
import torch

pytest.importorskip("triton")
from perf.soak_guards import Executor


def kernel():
    """Stands for one; only its name is used."""


def _run(body, **tensors) -> None:
    Executor(lambda kernel, grid, arguments, config: body(**arguments), guards=True)(kernel, (1,), tensors, None)


@pytest.mark.parametrize("place", [-1, 5, -500, 3000])
def test_a_write_outside_is_found(place):
    def body(x_ptr):
        x_ptr.as_strided((1,), (1,), x_ptr.storage_offset() + place).fill_(0)

    with pytest.raises(AssertionError, match="kernel: wrote out of the bounds of x_ptr"):
        _run(body, x_ptr=torch.zeros(5))
