"""The timed search on tiny calls: its workloads launch the kernel meant, and wrong results are never taken."""

import pytest
import torch

from tritonattn.backends.triton import launch
from tritonattn.tuner.workload import Size, Workload
from tritonattn.tuning.config import TileConfig
from tritonattn.tuning.table import SCALES, Key

SMALL = Size(batch=1, heads=2, length=24)
OF_A_GROUP = Size(batch=1, heads=4, length=40, group=2)
BEST, OTHER = TileConfig(16, 16, 4, 1), TileConfig(32, 16, 4, 1)


def keys() -> list[Key]:
    """Every kernel, without scales, and with all of them and their gradients."""
    return [Key(kernel, 64, scales, "short") for kernel, kinds in SCALES.items() for scales in (kinds[0], kinds[-1])]


@pytest.mark.parametrize("key", keys(), ids=str)
@pytest.mark.parametrize("size", [SMALL, OF_A_GROUP], ids=str)
def test_a_workload_agrees_with_the_reference(key, size, device):
    with launch.configured(key.kernel, BEST):
        assert Workload(key, size, torch.float16, device, copies=1).error() is None


@pytest.mark.parametrize("key", keys()[::2], ids=str)
def test_a_workload_launches_its_kernel_in_the_config(key, device, launched):
    workload = Workload(key, SMALL, torch.float16, device, copies=2)
    workload(0)
    launched.clear()
    with launch.configured(key.kernel, OTHER):
        workload(2)
    name = f"attention_{key.kernel}"
    assert (name, OTHER) in launched
    assert {other for other, _ in launched} <= {name, "attention_row_terms", "attention_decode_combine"}


def results_of(arguments) -> list[torch.Tensor]:
    """The output of a forward or decode kernel; the gradients of q, or of k and v, of a backward kernel."""
    if "results" in arguments:
        return [arguments["results"].out]
    return [arguments[name] for name in ("d_q_ptr", "d_k_ptr", "d_v_ptr") if name in arguments]


@pytest.mark.parametrize("key", keys()[::2], ids=str)
def test_a_result_that_is_wrong_for_the_last_head_alone(key, device, monkeypatch):
    """A fault in the programs at the end of a grid, which no other head shows."""
    size, run = Size(batch=2, heads=4, length=24, group=2), launch.run
    workload = Workload(key, size, torch.float16, device, copies=1)

    def spoil(kernel, grid, arguments, config):
        run(kernel, grid, arguments, config)
        if kernel.__name__ == f"attention_{key.kernel}":
            results_of(arguments)[-1][-1, -1] *= 1.2

    assert workload.error() is None
    monkeypatch.setattr(launch, "run", spoil)
    workload._forwards.clear()
    assert "expected an error of at most" in workload.error()
