"""A patched Llama trained by four processes has the losses of one, and its checkpoints go from world to world."""

import pytest
import torch

pytest.importorskip("transformers")
from . import training


@pytest.fixture(scope="module")
def one() -> list[float]:
    return training.losses_of_one()


@pytest.mark.parametrize("how", ["ddp", "fsdp, together", "fsdp, apart", "fsdp x tensor", "fsdp x context"])
def test_losses_and_learned_values_are_those_of_one_process(pool, one, how):
    for got in pool.run(training.losses, how):
        assert got == pytest.approx(one, rel=1e-5)


def test_what_is_learned_keeps_fp32_in_a_group_of_its_own(pool):
    assert pool.run(training.dtypes_seen) == [{(torch.bfloat16, torch.float32)}] * 4


def test_checkpoints_go_from_world_to_world(pool, tmp_path):
    pool.run(training.checkpointed, str(tmp_path))


def test_transformers_own_plan_shards_what_is_learned(pool, tmp_path):
    pytest.importorskip("transformers.distributed.tensor_parallel")
    assert max(pool.run(training.planned, str(tmp_path))) < 5e-6


def test_trainer_learns_what_one_process_learns(pool, tmp_path):
    wanted = training.trained_by_trainer(0, str(tmp_path), batch=8)
    assert max(abs(value - 1) for value in wanted) > 1e-3
    for got in pool.run(training.trained_by_trainer, str(tmp_path)):
        assert got == pytest.approx(wanted, abs=1e-6)
