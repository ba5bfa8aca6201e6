"""A Monitor of four processes has the record of one, and QK-clip leaves all of them with the same weights."""

import pytest

pytest.importorskip("transformers")
from . import watching


@pytest.fixture(scope="module")
def one():
    return watching.record_of_one()


@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp x tensor"])
def test_records_are_those_of_one_process(pool, one, tmp_path, how):
    for record in pool.run(watching.watched, how, str(tmp_path)):
        assert record["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert record["layers"].keys() == one["layers"].keys()
        for name, layer in one["layers"].items():
            for measure, wanted in layer.items():
                assert record["layers"][name][measure] == pytest.approx(wanted, rel=2e-4, abs=1e-9), measure


def test_clip_takes_the_largest_logits_of_all_ranks(pool):
    for gammas in pool.run(watching.direct):
        assert gammas == [1.0, 1.0, 1 / 3, 1.0, 1.0, 1.0, 1 / 4, 1.0]


def test_a_rank_in_another_step_or_alone_is_refused(pool):
    pool.run(watching.refused)
