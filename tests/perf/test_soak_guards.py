"""Launches between guards: what a kernel may write comes back, what it may not is found."""

import pytest
import torch

pytest.importorskip("triton")
from perf.soak_guards import Executor, soaking
from tritonattn.backends.triton import launch


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


def test_soaking_fills_new_memory_with_nan_and_puts_everything_back():
    before = launch.run, launch.config_for, torch.are_deterministic_algorithms_enabled()
    with soaking(guards=True) as executor:
        assert launch.run is executor
        assert torch.empty(1000).isnan().all()
        launch.config_for = None
    assert (launch.run, launch.config_for, torch.are_deterministic_algorithms_enabled()) == before
