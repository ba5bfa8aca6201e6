"""Monitors in threads: each counts the calls of its model, wherever they run, and leaves nothing."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import tritonattn
from tests.analysis.models import Net
from tests.analysis.test_monitor import QUIET, pytestmark, record_of
from tritonattn.analysis import Monitor
from tritonattn.core import observation
from tritonattn.core.observation import ObservedCall, Observer

__all__ = ["pytestmark"]


def run_together(*functions):
    """Results of functions that run in threads at the same time."""
    barrier = threading.Barrier(len(functions))

    def started(function):
        barrier.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result() for future in [pool.submit(started, function) for function in functions]]


def test_monitors_in_threads_see_their_own_models():
    nets = [Net(scaling=scaling) for scaling in ("sqrt_dim", "key_count", "none")]
    x = torch.randn(2, 5, 32)

    def loss(net):
        return net(x).square().sum()

    wanted = [record_of(net, loss)["layers"] for net in nets]

    def run(net):
        return lambda: [record_of(net, loss, loss) for _ in range(8)]

    for layers, records in zip(wanted, run_together(*map(run, nets)), strict=True):
        for record in records:
            assert record["layers"].keys() == {"attention"}
            assert record["layers"]["attention"]["calls"] == 2
            assert record["layers"]["attention"]["max_logit"] == layers["attention"]["max_logit"]


def test_a_thread_that_was_in_the_model_at_the_end_of_a_step_is_not_observed_later():
    net, x = Net(), torch.randn(2, 5, 32)
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        go_on.wait(10)

    def run():
        net(x)
        return observation.is_observed()

    hook = net.attention.o_proj.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        with Monitor(net, every=2, thresholds=QUIET) as monitor:
            observed = pool.submit(run)
            assert inside.wait(10)
            monitor.step()
        go_on.set()
        assert observed.result() is False
    hook.remove()


@pytest.mark.parametrize("key_bias", [None, torch.zeros(2, 5)])
def test_statistics_of_a_seen_call_are_no_call_when_taken_later(key_bias):
    seen: list[ObservedCall] = []
    observer = Observer(seen.append)
    observer.begin()
    try:
        tritonattn.attention(*torch.randn(3, 1, 2, 5, 4), key_bias=key_bias)
        seen[0].aux()
    finally:
        observer.close()
    assert len(seen) == 1
