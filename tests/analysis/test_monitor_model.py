"""A watched model computes, learns and is saved as without a `Monitor`, also under transformers' Trainer."""

import contextlib
import json
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import transformers

from tests.analysis.test_monitor import MEASURES, QUIET, close
from tests.huggingface.architectures import ARCHITECTURES
from tests.huggingface.test_patch import state
from tests.support.llama import ids, llama
from tests.support.refusals import refuses
from tritonattn.analysis import Monitor
from tritonattn.analysis.trainer import MonitorCallback
from tritonattn.core import observation
from tritonattn.huggingface import patch
from tritonattn.huggingface.architecture import attention_modules

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@cache
def trained(how: str, watched: bool, reentrant: bool | None = None):
    """Weights after three steps and the last record; reentrant, or not, checkpoints: None, without."""
    net = llama("sdpa" if how == "sdpa" else "eager", attention_dropout=0.2)
    if reentrant is not None:
        net.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if how == "patched":
        patch(net, "ssmax", layers=[1])
    before, optimizer = state(net), torch.optim.SGD(net.parameters(), 0.1)
    torch.manual_seed(3)
    monitor = Monitor(net, every=2, thresholds=QUIET) if watched else None
    with monitor or contextlib.nullcontext():
        for step in range(3):
            loss = net(ids(seed=step), labels=ids(seed=step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if monitor:
                monitor.step(loss)
    assert state(net) == before
    return net.state_dict(), monitor and monitor.last


@pytest.mark.parametrize("how", ["eager", "sdpa", "patched"])
def test_a_run_with_a_monitor_is_bit_for_bit_one_without(how):
    (plain, _), (watched, last) = trained(how, watched=False), trained(how, watched=True)
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert last["step"] == 2
    assert len(last["layers"]) == 2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("how", ["eager", "patched"])
def test_checkpointed_layers_count_once(how, reentrant):
    (plain, _), (_, wanted), (weights, got) = trained(how, False), trained(how, True), trained(how, True, reentrant)
    assert all(torch.equal(plain[name], weights[name]) for name in plain)
    for name, layer in wanted["layers"].items():
        close(got["layers"][name], layer)
        assert got["layers"][name]["calls"] == 1


@pytest.mark.parametrize("name", [name for name, one in ARCHITECTURES.items() if one.exists and one.supported])
def test_every_architecture_keeps_its_attention_and_is_seen(name):
    architecture = ARCHITECTURES[name]
    net, inputs = architecture.build(), architecture.inputs("left")
    wanted, before = architecture.outputs(net, inputs), state(net)
    with Monitor(net, every=1, thresholds=QUIET) as monitor:
        out = architecture.outputs(net, inputs)
        out.square().sum().backward()
        layers = monitor.step()["layers"]
    assert torch.equal(out, wanted)
    assert state(net) == before
    assert sorted(layers) == sorted(one.name for one in attention_modules(net) if one.obstacle is None)
    for layer in layers.values():
        assert layer["rows"] in {4 * 23, 4 * 26, 4 * 14, 4 * 20}  # texts without padding, speech and decoders, images
        assert all(value is not None and value == value for name in MEASURES for value in layer[name])


def test_biases_of_distances_count_alike_in_a_layer_that_is_patched_and_one_that_is_not():
    if not ARCHITECTURES["t5"].exists:
        pytest.skip("transformers has no T5 with attention functions")

    def layers(scaling):
        net, inputs = ARCHITECTURES["t5"].build(), ARCHITECTURES["t5"].inputs("left")
        for name, x in net.named_parameters():
            if "relative_attention_bias" in name:
                x.data.mul_(3000 / x.data.std())
        with contextlib.ExitStack() as contexts:
            if scaling is not None:
                contexts.enter_context(patch(net, scaling))
            monitor = contexts.enter_context(Monitor(net, every=1, thresholds=QUIET))
            ARCHITECTURES["t5"].outputs(net, inputs).square().sum().backward()
            return monitor.step()["layers"]

    found, wanted = layers("sqrt_dim"), layers(None)
    assert max(wanted["encoder.block.0.layer.0.SelfAttention"]["near_one_hot"]) > 0.5
    for name, layer in wanted.items():
        assert max(layer["max_logit"]) < 1000  # biases are above
        close(found[name], layer, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_leaves_the_model_whole(error, tmp_path):
    net, x = llama("sdpa"), ids()
    before = state(net)
    file = tmp_path / "a.jsonl"
    monitor = Monitor(net, every=1, file=file, thresholds=QUIET)

    def run():
        net(x)
        monitor.step()
        net.model.layers[1].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(error()))
        net(x)

    with pytest.raises(error), monitor:
        run()
    net.model.layers[1].mlp._forward_pre_hooks.clear()
    with Monitor(net, every=1, thresholds=QUIET):
        net.model.layers[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(error()))
        with pytest.raises(error):
            net(x)  # the layer is left once more on the way out
    net.model.layers[1]._forward_hooks.clear()
    assert state(net) == before
    assert observation.observers.get() == ()
    assert len(file.read_text().splitlines()) == 1
    refuses("RuntimeError: ~ got a Monitor that is not in use", monitor.step)


def test_an_attention_implementation_whose_masks_cannot_be_read_is_refused():
    net = llama("eager")
    with Monitor(net, every=1):
        refuses("RuntimeError: model: expected one that no Monitor is watching", patch, net)
    net.model.layers[0].self_attn.config._attn_implementation_internal = "flex_attention"
    before = state(net)
    refuses("ValueError: ~ got 'flex_attention' in model.layers.0.self_attn", Monitor(net).__enter__)
    assert state(net) == before


TEXTS = ids(16, 8)


def without_trainer(net) -> dict:
    """Everything that a Monitor could leave in a model, without the attributes and entries of a trainer."""
    return {key: value for key, value in state(net).items() if key not in ("attributes", "configs")}


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return len(TEXTS)

    def __getitem__(self, i):
        return {"input_ids": TEXTS[i], "labels": TEXTS[i]}


def trainer(net, folder, monitor=None, **options):
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "data_seed": 0}
    options |= {"learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    options |= {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    arguments = transformers.TrainingArguments(str(folder), **options)
    return transformers.Trainer(
        net, arguments, train_dataset=Texts(), eval_dataset=Texts(), callbacks=[monitor.callback()] if monitor else []
    )


def test_a_record_an_optimizer_step_that_says_what_the_trainer_says(tmp_path):
    net, file = llama("sdpa"), tmp_path / "a.jsonl"
    before = without_trainer(net)
    monitor = Monitor(net, every=2, file=file, thresholds=QUIET)
    run = trainer(net, tmp_path, monitor, eval_strategy="steps", eval_steps=1)
    run.train()
    assert without_trainer(net) == before
    assert not monitor.active
    records = [json.loads(line) for line in file.read_text().splitlines()]
    logged = [one["loss"] for one in run.state.log_history if "loss" in one]
    assert [one["step"] for one in records] == [0, 2]
    for record in records:
        assert record["loss"] == pytest.approx(logged[record["step"]], abs=2e-4)  # the trainer rounds
        for layer in record["layers"].values():
            assert layer["calls"] == 2  # micro-batches; the evaluation after the step before is not among them
            assert layer["rows"] == 2 * 2 * 8 * 4
            assert len(layer["q_gradient_norm"]) == 4
    plain = llama("sdpa")
    trainer(plain, tmp_path).train()
    for one, other in zip(plain.parameters(), net.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_monitor_that_is_open_stays_open(tmp_path):
    monitor = Monitor(llama(), every=1, thresholds=QUIET)
    with monitor:
        trainer(monitor.model, tmp_path, monitor).train()
        assert monitor.active
        assert monitor.last["step"] == 3


@pytest.mark.parametrize(("enabled", "scale"), [(True, 64.0), (False, 1.0)])
def test_gradients_are_divided_by_the_losss_scale(enabled, scale):
    scaler, seen = SimpleNamespace(get_scale=lambda: 64.0, is_enabled=lambda: enabled), []
    callback = MonitorCallback(SimpleNamespace(step=lambda grad_scale: seen.append(grad_scale)))
    for optimizer in (SimpleNamespace(scaler=scaler), SimpleNamespace(scaler=None), object()):
        callback.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
        callback.on_step_end(None, None, None)
    assert seen == [scale, 1.0, 1.0]
