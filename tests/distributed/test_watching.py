"""A Monitor of four processes has the record of one, and QK-clip leaves all of them with the same weights."""

import math
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers")
from tests.distributed.models import HEADS, by_heads, llama, sharded, tokens
from tests.distributed.pool import on_every_rank
from tests.support.refusals import refuses
from tritonattn.analysis import Monitor, Thresholds, qk_clip
from tritonattn.core.torch_distributed import whole

THRESHOLD = 0.09


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    model, ids = llama(), tokens()
    with Monitor(model, every=1, reduce=False, thresholds=Thresholds(near_uniform=None)) as monitor:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return monitor.step(loss)  # pyright: ignore[reportReturnType]


def watched(rank: int, how: str, folder) -> dict[str, Any]:
    """The record of a step; the alarms of its largest logits clip all ranks alike, by the formula."""
    mesh = init_device_mesh("cpu", (2, 2) if how == "fsdp x tensor" else (4, 1), mesh_dim_names=("dp", "tp"))
    inner = llama()
    before = [layer.self_attn.q_proj.weight.detach().clone() for layer in inner.model.layers]
    if how == "ddp":
        model = DistributedDataParallel(inner)
    else:
        model = sharded(by_heads(inner, mesh["tp"]) if how == "fsdp x tensor" else inner, mesh["dp"])
    ids = tokens().chunk(mesh["dp"].size())[mesh["dp"].get_local_rank()]
    file = folder / f"{how}.jsonl"
    limits, clip = Thresholds(max_logit=THRESHOLD, near_uniform=None), qk_clip(inner, THRESHOLD)
    monitor, record = Monitor(inner, every=2, thresholds=limits, on_alarm=clip, file=file), None
    with monitor, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):  # the second step is not watched
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            record = monitor.step(loss) or record
    for layer, weight, name in zip(inner.model.layers, before, record["layers"], strict=True):
        largest = torch.tensor(record["layers"][name]["max_logit"])
        gamma = (THRESHOLD / largest).clamp(max=1)
        assert (gamma < 1).any()
        wanted = (weight.view(HEADS, -1, weight.shape[1]) * gamma[:, None, None]).view_as(weight)
        torch.testing.assert_close(whole(layer.self_attn.q_proj.weight.detach()), wanted, rtol=1e-5, atol=1e-7)
    assert any("max_logit" in str(one.message) for one in said) == (rank == 0)
    dist.barrier()
    assert len(file.read_text().splitlines()) == 1
    return record


@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp x tensor"])
def test_records_are_those_of_one_process(pool, one, tmp_path, how):
    for record in pool.run(watched, how, tmp_path):
        assert record["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert record["layers"].keys() == one["layers"].keys()
        for name, layer in one["layers"].items():
            for measure, wanted in layer.items():
                assert record["layers"][name][measure] == pytest.approx(wanted, rel=2e-4, abs=1e-9), measure


@on_every_rank
def test_clip_takes_the_largest_logits_and_a_rank_in_another_step_or_alone_is_refused(rank: int) -> None:
    """`clip` takes the largest logits of all ranks, which see layers that others do not; what is no step is refused."""
    mine = [0.1, math.nan, 1.0 + rank, None]
    found = qk_clip(llama(), 1.0).clip({f"model.layers.{rank % 2}.self_attn": mine})
    assert found["model.layers.0.self_attn"].tolist() == [1.0, 1.0, 1 / 3, 1.0]
    assert found["model.layers.1.self_attn"].tolist() == [1.0, 1.0, 1 / 4, 1.0]
    refuses("ValueError: ~ reduce=True", Monitor, llama(), on_alarm=print, reduce=False)
    monitor = Monitor(llama(), every=1)
    monitor.steps = rank
    with pytest.raises(RuntimeError, match="same step"), monitor:
        monitor.step(1.0)


@on_every_rank
def test_the_loss_is_the_mean_of_the_ranks_that_have_one(rank: int) -> None:
    with Monitor(torch.nn.Identity(), every=1) as monitor:
        for loss, wanted in ((float(rank) if rank else None, 2.0), (None, None)):
            record = monitor.step(loss)
            assert record is not None
            assert record["loss"] == wanted
