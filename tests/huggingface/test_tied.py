"""`patch(parameters=)`: tensors of a model that are parameters of its scaling, and hidden from its code meanwhile."""

import copy
import json
import pickle
import threading
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from tests.huggingface.architectures import ARCHITECTURES
from tests.huggingface.test_patch import state
from tests.support.refusals import refuses
from tritonattn.huggingface import patch, patched
from tritonattn.integrations.serving.settings import layer_settings
from tritonattn.nn import SSMax, scaling_parameters

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
HEADS, S, WHERE = 4, "ssmax_scale", "model.layers.{}.self_attn"
IDS = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(0))
NAMES = {"layers.*.self_attn.ssmax_scale": "s"}


class Attention(nn.Module):
    """A layer over all keys without positions, whose q is multiplied by s_h ln n, n from the length of the call."""

    is_causal, shape = True, (HEADS,)

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // HEADS
        self.num_key_value_groups = 1
        self.qkv_proj, self.o_proj = (nn.Linear(config.hidden_size, n * config.hidden_size) for n in (3, 1))
        self.ssmax_scale = nn.Parameter(torch.empty(self.shape))

    def factor(self, length):
        if self.ssmax_scale is None:
            return 1.0
        return self.ssmax_scale.view(-1, 1, 1) * torch.arange(1, length + 1).log()[:, None]  # [Hq, S, 1]

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        q, k, v = self.qkv_proj(hidden_states).unflatten(-1, (3, HEADS, -1)).transpose(1, 3).unbind(2)
        q = q * self.factor(hidden_states.shape[1])
        past_key_values = kwargs.get("cache", past_key_values)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, weights = attend(self, q, k, v, attention_mask, scaling=self.head_dim**-0.5)
        return self.o_proj(out.flatten(2)), weights


class Broadcast(Attention):
    shape = (1, HEADS, 1, 1)


class Unguarded(Attention):
    def factor(self, length):
        return self.ssmax_scale.view(-1, 1, 1) * torch.arange(1, length + 1).log()[:, None]


class Model(LlamaForCausalLM):
    attention = Attention

    def __init__(self, config):
        with mock.patch.object(modeling_llama, "LlamaAttention", self.attention):
            super().__init__(config)


class BroadcastModel(Model):
    attention = Broadcast


def build(model_type=Model):
    torch.manual_seed(0)
    model = model_type(LlamaConfig(**ARCHITECTURES["llama"].arguments, attn_implementation="sdpa")).eval()
    for i, layer in enumerate(model.model.layers):
        with torch.no_grad():
            scale = layer.self_attn.ssmax_scale
            scale.copy_(torch.linspace(0.2 + i, 0.9 + i, HEADS).view_as(scale))
    return model


def gradients(model):
    model.zero_grad()
    out = model(IDS, labels=IDS, use_cache=False)
    out.loss.backward()
    return [out.logits, *(x.grad for x in model.parameters())]


def assert_near(found, expected):
    for x, wanted in zip(found, expected, strict=True):
        assert (x - wanted).abs().max() <= 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("model_type", [Model, BroadcastModel])
def test_the_tensor_stays_the_model_s_and_is_the_scaling_s(model_type):
    model = build(model_type)
    before, weights, expected = state(model), copy.deepcopy(model.state_dict()), gradients(model)
    with patch(model, scaling="ssmax", parameters=NAMES) as one:
        assert one.layers.keys() == {WHERE.format(0), WHERE.format(1)}
        assert f"s from {S}" in one.report()
        for name, layer in one.layers.items():
            ours = model.get_parameter(f"{name}.{S}")
            assert layer.scaling.s.shape == (HEADS,)
            assert (layer.scaling.s is ours) == (model_type is Model)
            assert any(x is ours for x in scaling_parameters(model))
            assert layer.scaling.b is None
            layer.scaling.reset_parameters()
        assert model.state_dict().keys() == weights.keys()
        assert [name for name, _ in model.named_parameters()] == before["parameters"]
        assert_near(gradients(model), expected)
        optimizer = SGD(scaling_parameters(model), lr=1.0)
        optimizer.step()
        moved = model.state_dict()[f"{WHERE.format(0)}.{S}"]
        assert (moved - weights[f"{WHERE.format(0)}.{S}"]).abs().max() > 1e-4
        model.load_state_dict(weights, assign=True)
        assert_near([model(IDS).logits], expected[:1])
        cached = model(IDS[:, :9], use_cache=True)
        for i in range(9, 12):  # where the model's own code takes n to be 1
            cached = model(IDS[:, i : i + 1], past_key_values=cached.past_key_values, use_cache=True)
            assert_near(cached.logits, expected[0][:, i : i + 1])
    assert state(model) == before
    assert torch.equal(model(IDS).logits, expected[0])


def test_copies_pickles_compiled_and_distributed_models_agree():
    model = build()
    patch(model, scaling="ssmax", parameters=NAMES)
    expected = gradients(model)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        model.model.layers[0].self_attn.ssmax_scale.add_(1)
        assert not torch.allclose(model(IDS).logits, expected[0], atol=1e-2)
        model.model.layers[0].self_attn.ssmax_scale.sub_(1)
    for other in (copied, pickled):
        torch.testing.assert_close(gradients(other), expected)
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(build())
        patch(wrapped, scaling="ssmax", parameters=NAMES)  # no parameter is added
        torch.testing.assert_close(wrapped(IDS).logits, expected[0])
        for layer in (*pickled.model.layers, pickled):
            fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        found = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in gradients(pickled)]
        torch.testing.assert_close(found, expected)
    finally:
        destroy_process_group()


def test_a_compiled_layer_reads_the_tensor_of_now():
    torch._dynamo.reset()
    model = build()
    patch(model, scaling="ssmax", parameters=NAMES)
    layer, x = model.model.layers[0].self_attn, torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x)[0], layer(x)[0])
        with torch.no_grad():
            layer.ssmax_scale.mul_(3)
    model.load_state_dict(build().state_dict(), assign=True)
    torch.testing.assert_close(compiled(x)[0], layer(x)[0])


def test_threads_in_one_layer_hide_it_until_the_last_leaves():
    model, waiting, running = build(), threading.Event(), threading.Event()
    patch(model, scaling="ssmax", parameters=NAMES)
    first, seen = model.model.layers[0].self_attn, []

    def wait(*_):
        if threading.current_thread() is slow:
            running.set()
            waiting.wait(10)
            seen.append(first.ssmax_scale)

    first.register_forward_pre_hook(wait)
    with torch.no_grad():
        slow = threading.Thread(target=model, args=(IDS,))
        slow.start()
        running.wait(10)
        model(IDS)
        waiting.set()
        slow.join()
    assert seen == [None]
    assert first.ssmax_scale is not None


def test_it_is_saved_and_loaded_as_the_model_s(tmp_path):
    model = build()
    names = model.state_dict().keys()
    patch(model, scaling="ssmax", parameters=NAMES)
    with torch.no_grad():
        model.model.layers[1].self_attn.ssmax_scale.add_(0.5)
        expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() - names == {"needs_tritonattn"}
    layers = json.loads((tmp_path / "config.json").read_text())["tritonattn"]["layers"]
    assert layers[WHERE.format(1)]["tied"] == {"s": S}
    again = Model.from_pretrained(tmp_path).eval()
    assert torch.equal(again(IDS).logits, expected)
    assert patched(again).report() == patched(model).report()
    assert again.state_dict().keys() == names
    with pytest.raises(ValueError, match=r"tied\['s'\]: expected a tensor of shape \[4\] at 'ssmax_scale' of LlamaAtt"):
        LlamaForCausalLM.from_pretrained(tmp_path)
    message = "NotImplementedError: tritonattn.layers['model.layers.1.self_attn'].tied: expected a scaling with ~ in a"
    served = tuple(f"{WHERE.format(i)}.attn" for i in (0, 1))
    refuses(message, layer_settings, {"layers": layers}, served[1], served, HEADS)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"parameters": ["*.ssmax_scale"]}, "TypeError: parameters: expected a dict from names or ~ got list"),
        ({"parameters": {"*.ssmax_scale": 1}}, "TypeError: parameters: expected a dict ~ got '*.ssmax_scale': int 1"),
        (
            {"parameters": {"*.ssmax_s": "s"}},
            "ValueError: parameters['*.ssmax_s']: expected a tensor of shape [4], "
            "model.layers.0.self_attn.ssmax_scale, model.layers.1.self_attn.ssmax_scale, got no match",
        ),
        ({"parameters": {"*.ssmax_scale": "theta"}}, "ValueError: expected one of the scaling's parameters s, got 'th"),
        ({"parameters": NAMES, "scaling": "dim"}, "ValueError: expected a learned scaling, 'ssmax', got 's' of one w"),
        ({"parameters": {"*.self_attn.*": "s"}}, "ValueError: one a layer, got ssmax_scale and qkv_proj.weight of mod"),
        ({"parameters": {"layers.1.*.ssmax_scale": "s"}}, "ValueError: parameters: expected a tensor for 's' in every"),
        ({"parameters": {"*.o_proj.weight": "s"}}, "ValueError: self_attn.ssmax_scale, got a torch.float32 ~ [32, 32]"),
    ],
)
def test_other_names_are_refused_and_change_nothing(arguments, error):
    model = build()
    before = state(model)
    refuses(error, patch, model, **{"scaling": "ssmax", **arguments})
    assert state(model) == before


def test_code_that_reads_it_always_is_told_so():
    class Refused(Model):
        attention = Unguarded

    model = build(Refused)
    with patch(model, scaling="ssmax", parameters=NAMES):
        message = "AttributeError: parameters: expected code that multiplies q only where Unguarded.ssmax_scale"
        refuses(message, model, IDS)
    model(IDS)


def test_a_layer_whose_scaling_has_no_such_parameter_is_left_alone_and_b_is_tied_too():
    model = build()
    for layer in model.model.layers:
        layer.self_attn.ssmax_bias = nn.Parameter(torch.full((HEADS,), 0.3))
    with patch(model, layers={0: "ssmax", 1: "key_norm_mean"}, parameters={**NAMES, "*.ssmax_bias": "b"}):
        found = model(IDS).logits
    scaling = SSMax(HEADS, base=2.0, bias=True)
    scaling.load_state_dict({"s": model.model.layers[0].self_attn.ssmax_scale, "b": torch.full((HEADS,), 0.3)})
    model.model.layers[0].self_attn.ssmax_scale = None
    with patch(model, layers={0: scaling, 1: "key_norm_mean"}):
        assert torch.equal(model(IDS).logits, found)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_s_scaling_that_the_model_lacks_is_warned_of(sharded, tmp_path, recwarn):
    build().save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    with patch(Model.from_pretrained(tmp_path), scaling="ssmax", parameters=NAMES):
        pass
    assert not [one for one in recwarn if "unexpected" in str(one.message)]
    lacking = LlamaForCausalLM.from_pretrained(tmp_path)
    expected = r"without model.layers.0.self_attn.ssmax_scale, model.layers.1.self_attn.ssmax_scale, which loading"
    with pytest.warns(UserWarning, match=expected), patch(lacking):
        pass
