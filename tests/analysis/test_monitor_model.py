"""A watched model computes, learns and is saved as without a `Monitor`, and is whole afterwards."""

import contextlib
from functools import cache

import pytest
import torch

from tests.analysis import test_monitor
from tests.analysis.test_monitor import MEASURES, QUIET, close
from tests.huggingface.architectures import ARCHITECTURES
from tests.huggingface.test_patch import state
from tests.support.llama import ids, llama
from tests.support.refusals import refuses
from tritonattn.analysis import Monitor
from tritonattn.core import observation
from tritonattn.huggingface import patch
from tritonattn.huggingface.architecture import attention_modules

pytestmark = test_monitor.pytestmark


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
def test_every_architecture_keeps_its_own_attention_and_is_seen(name):
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
    net.model.layers[0].self_attn.config._attn_implementation_internal = "flex_attention"
    before = state(net)
    refuses("ValueError: ~ got 'flex_attention' in model.layers.0.self_attn", Monitor(net).__enter__)
    assert state(net) == before
