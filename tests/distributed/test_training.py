"""A patched Llama trained by four processes has the losses of one."""

from __future__ import annotations

import pytest

from . import training


@pytest.fixture(scope="module")
def one() -> list[float]:
    return training.losses_of_one()


@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp x tensor", "fsdp x context"])
def test_losses_and_learned_values_are_those_of_one_process(pool, one, how):
    for got in pool.run(training.losses, how):
        assert got == pytest.approx(one, rel=1e-5)
