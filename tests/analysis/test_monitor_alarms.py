"""Records of a Monitor, its alarms, and the actions on them."""

import json
import math
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.analysis.models import Net
from tests.support.llama import HEADS, ids, llama
from tests.support.refusals import refuses
from tritonattn.analysis import Monitor, Thresholds, qk_clip
from tritonattn.analysis.alarms import Alarms, layer_value
from tritonattn.core.errors import install
from tritonattn.huggingface import patch, patched

QUIET = Thresholds(None, None, None)
NAME = "attention"


def lines(file) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in file.read_text().splitlines()]


def step(net, monitor, *loss, **keywords):
    """A step of a model on the same tensor, and its record."""
    torch.manual_seed(0)
    net(torch.randn(2, 5, 32), **keywords).sum().backward()
    return monitor.step(*loss)


def sharpened(net, factor):
    with torch.no_grad():
        net.attention.q_proj.weight.mul_(factor)
        net.attention.q_proj.bias.mul_(factor)


def test_a_record_is_a_line(tmp_path):
    net, file = Net(), tmp_path / "a.jsonl"
    with Monitor(net, every=2, file=file, thresholds=QUIET) as monitor:
        for number in range(3):
            net(torch.randn(2, 5, 32)).sum().backward()
            monitor.step(torch.tensor(float(number)))
            if number == 0:
                assert len(lines(file)) == 1  # at once, not at the end
    first, second = lines(file)
    assert (first["step"], second["step"], second["loss"]) == (0, 2, 2.0)
    assert second == json.loads(json.dumps(monitor.last))
    assert len(second["layers"][NAME]["max_logit"]) == HEADS
    with Monitor(net, every=1, file=file, thresholds=QUIET) as monitor:
        monitor.restart(3)
        net(torch.randn(2, 5, 32)).sum().backward()
        monitor.step(1.0)
        file.rename(file.with_suffix(".whole"))
        file.mkdir()  # nothing can be appended to it, as on a full disk
        net(torch.randn(2, 5, 32)).sum().backward()
        with pytest.warns(RuntimeWarning, match="Monitor: a record was not written: .*a.jsonl"):
            monitor.step(2.0)
    assert [one["step"] for one in lines(file.with_suffix(".whole"))] == [0, 2, 3]


def test_it_warns_once_a_layer_until_it_recovers():
    net, said, stood = Net(), [], []
    with Monitor(net, every=1, thresholds=Thresholds(50.0, None, None), on_alarm=stood.append) as monitor:
        for factor in (1, 1000, 1, 1, 1e-3, 1, 1000):
            sharpened(net, factor)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                record = step(net, monitor)
            said.append([str(one.message) for one in caught])
            assert bool(record["alarms"]) == (max(record["layers"][NAME]["max_logit"]) > 50)
    assert [len(one) for one in said] == [0, 1, 0, 0, 0, 0, 1]
    assert said[1][0].startswith("step 1: attention: max_logit ")
    assert said[1][0].endswith(", threshold 50")
    found = [(one.step, one.new) for alarms in stood for one in alarms]
    assert found == [(1, True), (2, False), (3, False), (6, True)]
    assert len(stood[0][0].heads) == HEADS
    assert stood[0][0].value == max(stood[0][0].heads)


@pytest.mark.parametrize(
    ("measure", "scaling"), [("max_logit", "sqrt_dim"), ("near_one_hot", 1e6), ("near_uniform", 1e-6)]
)
def test_a_limit_just_below_the_measure_fires_and_one_at_it_is_silent(measure, scaling):
    net = Net(scaling=scaling)
    with Monitor(net, every=1, thresholds=QUIET) as monitor:
        record = step(net, monitor)
    assert record["alarms"] == []
    value = layer_value(measure, record["layers"][NAME][measure])
    assert value > 0.1
    with Monitor(net, every=1, thresholds=replace(QUIET, warmup=0, **{measure: value * 0.99})) as monitor:
        with pytest.warns(RuntimeWarning, match=rf"^step 0: attention: {measure} .*, threshold"):
            (alarm,) = step(net, monitor)["alarms"]
    assert (alarm["measure"], alarm["value"]) == (measure, pytest.approx(value))
    with Monitor(net, every=1, thresholds=replace(QUIET, warmup=0, **{measure: value})) as monitor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert step(net, monitor)["alarms"] == []


def test_a_layer_that_begins_uniform_alarms_after_the_warmup():
    net = Net(scaling=1e-6)
    with Monitor(net, every=1, thresholds=Thresholds(warmup=2)) as monitor:
        for wanted in ([], [], ["near_uniform"]):
            with pytest.warns(RuntimeWarning, match="step 2: .*near_uniform") if wanted else nullcontext():
                assert [alarm["measure"] for alarm in step(net, monitor)["alarms"]] == wanted
    assert Thresholds().warmup > 0


def test_shares_of_a_layer_are_means_over_its_heads():
    measures = {"max_logit": [1.0, 101.0], "near_one_hot": [1.0, 0.875], "near_uniform": [1.0, 0.5]}
    found = Alarms(Thresholds()).of(Thresholds().warmup, {"layer": measures})
    assert [(one.measure, one.value) for one in found] == [("max_logit", 101.0), ("near_one_hot", 0.9375)]


@pytest.mark.parametrize("loss", [math.nan, torch.tensor(math.inf)])
def test_a_loss_that_is_not_finite_alarms_in_any_step(loss, tmp_path):
    net, file, stood = Net(), tmp_path / "a.jsonl", []
    with Monitor(net, every=10, file=file, thresholds=QUIET, on_alarm=stood.extend) as monitor:
        step(net, monitor, 1.0)
        monitor.step(1.0)
        with pytest.warns(RuntimeWarning, match="step 2: loss"):
            assert monitor.step(loss) is None
        monitor.step(loss)  # said already
        monitor.step(1.0)
        with pytest.warns(RuntimeWarning, match="step 5: loss"):
            monitor.step(loss)
    assert [(one["step"], one["loss"]) for one in lines(file)] == [(0, 1.0), (2, None), (3, None), (5, None)]
    assert {one.measure for one in stood} == {"loss"}
    assert [(one.step, one.new) for one in stood] == [(2, True), (3, False), (5, True)]


def test_a_nan_in_one_head_alarms_and_a_layer_without_rows_does_not():
    net = Net()
    with Monitor(net, every=1) as monitor:
        assert step(net, monitor, key_lengths=torch.tensor([0, 0]))["alarms"] == []
        with torch.no_grad():
            net.attention.q_proj.bias[-1] = math.nan
        with pytest.warns(RuntimeWarning, match="max_logit nan"):
            step(net, monitor)


def test_an_alarm_says_of_which_head_it_is():
    """Heads go by their number, also next to one without rows."""
    net, stood = Net(), []
    sharpened(net, 1000)
    mask = (torch.arange(HEADS) > 0)[None, :, None, None]
    clip = qk_clip(net, 100.0)
    before = net.attention.q_proj.weight.clone().unflatten(0, (HEADS, -1))

    def act(alarms):
        stood.extend(alarms)
        clip(alarms)

    with Monitor(net, every=1, thresholds=Thresholds(100.0, None, None), on_alarm=act) as monitor:
        with pytest.warns(RuntimeWarning, match="max_logit"):
            step(net, monitor, mask=mask)
    assert stood[0].heads[0] is None
    assert len(stood[0].heads) == HEADS
    after = net.attention.q_proj.weight.unflatten(0, (HEADS, -1))
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[-1], before[-1])


def test_undo_on_alarm():
    net, x = llama(), ids()
    with torch.no_grad():
        wanted = net(x).logits
    patch(net, "key_norm_sum", gain=1e-3)
    with Monitor(net, every=1, thresholds=Thresholds(warmup=0), on_alarm="undo") as monitor:
        net(x)
        with pytest.warns(RuntimeWarning, match="near_uniform"):
            monitor.step()
        assert patched(net) is None
        net(x)
        record = monitor.step()  # it goes on, with the model's attention
    assert len(record["layers"]) == 2
    assert record["alarms"] == []
    with torch.no_grad():
        assert torch.equal(net(x).logits, wanted)


def test_loggers_get_the_numbers_of_watched_steps_by_name_and_their_failure_ends_no_run(monkeypatch):
    net, logged, scalars = Net(), [], {}
    writer = SimpleNamespace(add_scalar=lambda name, value, step: scalars.update({(name, step): value}))

    def log(values, step):
        logged.append((values, step))
        if step == 2:
            raise ConnectionError("no route")

    with Monitor(net, every=2, log=log, tensorboard=writer, thresholds=QUIET) as monitor:
        layer = step(net, monitor, 2.0)["layers"][NAME]
        step(net, monitor)
        with pytest.warns(RuntimeWarning, match="a record was not written: no route"):
            step(net, monitor)
    (values, first), (later, second) = logged
    assert (first, second) == (0, 2)
    assert values["loss"] == 2.0
    assert values["attention/max_logit"] == max(layer["max_logit"])
    assert values["attention/k_gradient_norm"] == pytest.approx(sum(layer["k_gradient_norm"]) / 2)
    named = {f"{NAME}/{one}" for one in layer if isinstance(layer[one], list)}
    assert values.keys() - {"loss"} == later.keys() == named
    assert all(isinstance(value, float) for value in values.values())
    assert scalars == {(name, at): value for numbers, at in logged for name, value in numbers.items()}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refuses(f"ImportError: ~ {install('monitor')}", Monitor, Net(), tensorboard="runs")


def test_the_loss_of_a_gpu_is_read_in_watched_steps_only(monkeypatch):
    monkeypatch.setattr(sys.modules["tritonattn.analysis.monitor"], "_is_elsewhere", lambda loss: True)
    net, stood = Net(), []
    losses = [1.0, math.nan, 1.0, 1.0, 1.0, 1.0, 1.0]
    with Monitor(net, every=3, thresholds=QUIET, on_alarm=stood.extend) as monitor:
        for number, loss in enumerate(losses):
            said = pytest.warns(RuntimeWarning, match="step 3: loss: nan") if number == 3 else nullcontext()
            with said:
                step(net, monitor, torch.tensor(loss))
    assert [one.step for one in stood] == [3]
    assert monitor.last["alarms"] == []
