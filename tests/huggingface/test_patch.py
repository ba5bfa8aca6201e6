"""`patch`: what it changes, what it leaves alone, what it says, and how all of it is taken back."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers
from torch import nn

import tritonattn
from tests.huggingface.architectures import ARCHITECTURES, VERSION
from tests.huggingface.checks import gradients
from tritonattn.huggingface import NAME, patch, patched
from tritonattn.visibility import Visibility

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
SUPPORTED = [name for name, one in ARCHITECTURES.items() if one.exists and one.supported]
LLAMA = ARCHITECTURES["llama"]
FIRST, SECOND = "model.layers.0.self_attn", "model.layers.1.self_attn"


def logits(network, **inputs):
    with torch.no_grad():
        return network(**(inputs or LLAMA.inputs("left"))).logits


def state(network) -> dict:
    """Whatever a patch could have left behind."""
    configs = {id(m.config): m.config.to_dict() for m in network.modules() if hasattr(m, "config")}
    return {
        "parameters": [name for name, _ in network.named_parameters()],
        "modules": [(name, type(m), id(getattr(m, "config", None))) for name, m in network.named_modules()],
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in network.modules()],
        "attributes": [set(vars(m)) for m in network.modules()],
        "implementations": {key: getattr(m.config, "_attn_implementation", None) for m in network.modules()
                            if hasattr(m, "config") for key in [id(m.config)]},
        "configs": configs,
    }  # fmt: skip


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", SUPPORTED)
def test_undo_is_bit_identical(name, implementation):
    architecture = ARCHITECTURES[name]
    network, inputs = architecture.build("eager"), architecture.inputs()
    if implementation == "sdpa" and network._supports_sdpa:
        network = architecture.build("sdpa")
    with torch.no_grad():
        wanted, before = architecture.outputs(network, inputs), state(network)
        with patch(network, scaling="ssmax", gain=torch.ones(4, 1)) as one:
            assert not torch.equal(architecture.outputs(network, inputs), wanted)
            assert patched(network) is one
        assert patched(network) is None
        assert torch.equal(architecture.outputs(network, inputs), wanted)
    assert state(network) == before
    one.undo()


def test_the_context_undoes_on_an_error():
    network = LLAMA.build()
    with pytest.raises(KeyboardInterrupt), patch(network, scaling="none"):
        raise KeyboardInterrupt
    assert patched(network) is None


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["none", "left", "holes"])
def test_layers_left_out_keep_their_own_numbers(implementation, padding):
    network, inputs = LLAMA.build(implementation), LLAMA.inputs(padding)
    outputs = []
    for layer in network.model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
    wanted = logits(network, **inputs)
    first, second = outputs
    outputs.clear()
    configs = [layer.self_attn.config for layer in network.model.layers]
    with patch(network, scaling="sqrt_dim", layers=[1]):
        got = logits(network, **inputs)
        assert torch.equal(outputs[0], first)
        assert network.model.layers[0].self_attn.config is configs[0]
        assert network.config._attn_implementation == implementation
    seen = inputs.get("attention_mask", torch.ones(2, 13)).bool()
    torch.testing.assert_close(outputs[1][seen], second[seen], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[seen], wanted[seen], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["mistral", "gemma3", "llama4", "whisper", "bart", "gpt2", "gpt_neox"])
def test_a_part_of_a_model_generates_as_before(name, implementation):
    architecture = ARCHITECTURES[name]
    network, inputs = architecture.build(implementation), architecture.inputs("left")
    wanted = network.generate(**inputs, max_new_tokens=9, do_sample=False, pad_token_id=0)
    with patch(network, layers=[1]):
        assert torch.equal(network.generate(**inputs, max_new_tokens=9, do_sample=False, pad_token_id=0), wanted)


def test_a_part_of_a_model_prefills_a_static_cache():
    """sdpa gets no mask there, and means the upper left corner."""
    network, inputs = LLAMA.build("sdpa"), LLAMA.inputs()
    options = {"max_new_tokens": 9, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    wanted = network.generate(**inputs, **options)
    with patch(network, layers=[0]):
        assert torch.equal(network.generate(**inputs, **options), wanted)


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        (None, {FIRST: "none", SECOND: "none"}),
        (1, {SECOND: "none"}),
        ([1, 0], {FIRST: "none", SECOND: "none"}),
        ("*.1.*", {SECOND: "none"}),
        ("model.layers.1", {SECOND: "none"}),
        (FIRST, {FIRST: "none"}),
        ({1: "dim"}, {SECOND: "dim"}),
        ({"*": "dim", 0: {"scaling": "cosine", "gain": 2.0}}, {FIRST: "cosine", SECOND: "dim"}),
        ({0: {"gain": 2.0}}, {FIRST: "none"}),
    ],
)
def test_layers_by_number_name_pattern_and_dict(layers, chosen):
    with patch(LLAMA.build(), scaling="none", layers=layers) as one:
        assert {name: own.scaling.name for name, own in one.layers.items()} == chosen
    assert one.layers == {}


def test_every_layer_has_its_own_scaling():
    network = LLAMA.build()
    options = {0: {"scaling": "key_count", "gain": 3.0}, 1: "dim"}
    seen = {}
    with patch(network, layers=options) as one, one.watch(
        lambda module, query, key, arguments, aux: seen.update({module.layer_idx: arguments})
    ):
        logits(network)
    assert [seen[i]["scaling"].name for i in (0, 1)] == ["key_count", "dim"]
    assert [seen[i]["gain"] for i in (0, 1)] == [3.0, None]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": [7]}, ValueError, "layers: expected .*self_attn.*got 7"),
        ({"layers": ["lm_head"]}, ValueError, "lm_head"),
        ({"layers": []}, ValueError, "at least one"),
        ({"layers": [1.5]}, TypeError, "float"),
        ({"layers": {0: {"scalling": 1}}}, ValueError, "scalling"),
        ({"scaling": "sqrt"}, ValueError, "scaling: expected one of"),
        ({"scaling": torch.ones(4)}, TypeError, "scaling"),
        ({"gain": torch.ones(3, 1)}, ValueError, r"gain: .*\[4, 1\], got \[3, 1\]"),
        ({"gain": "2"}, TypeError, "gain"),
        ({"backend": "cuda"}, ValueError, "backend"),
    ],
)
def test_wrong_arguments_change_nothing(arguments, error, message):
    network = LLAMA.build()
    before = state(network)
    with pytest.raises(error, match=message):
        patch(network, **arguments)
    assert state(network) == before


def test_a_patched_model_is_not_patched_again():
    network = LLAMA.build()
    with patch(network, layers=[0]):
        for model in (network, network.model):
            with pytest.raises(ValueError, match="undo"):
                patch(model, layers=[1])


def test_what_has_no_attention_to_patch_is_refused_by_name():
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=9))
    with pytest.raises(NotImplementedError, match=r"BloomForCausalLM: BloomAttention .*AttentionInterface"):
        patch(bloom)
    with pytest.raises(ValueError, match="Linear: no attention module"):
        patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model"):
        patch("llama")


def test_t5_is_refused_by_name():
    config = transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    network = transformers.T5ForConditionalGeneration(config)
    wanted = "position_bias" if VERSION >= (5, 24) else "T5LayerSelfAttention"
    with pytest.raises(NotImplementedError, match=f"T5ForConditionalGeneration.*{wanted}"):
        patch(network)


def test_implementations_whose_masks_nobody_else_reads():
    network = LLAMA.build()
    network.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"flash_attention_2.*set_attn_implementation"):
        patch(network, layers=[0])
    with patch(network):
        logits(network)
    assert network.config._attn_implementation == "flash_attention_2"


def test_the_report_says_what_is_what():
    network = ARCHITECTURES["gemma2"].build()
    with patch(network, scaling="qwen_logn", layers=[1], gain=torch.ones(4, 1)) as one:
        lines = one.report().splitlines()
    assert lines[0].split() == ["module", "layer", "type", "heads", "head_dim", "before", "scaling"]
    rows = {line.split("  ")[0]: line for line in lines[2:]}
    assert set(rows) == {FIRST, SECOND}
    for part in ("sliding_attention", "4/2", " 8 ", "eager", "left alone: not among"):
        assert part in rows[FIRST]
    for part in ("full_attention", "4/2", " 8 ", "eager", "qwen_logn(train_length=8192)", "learned gain"):
        assert part in rows[SECOND]
    assert "undone" in one.report()


@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_the_report_tells_cross_attention(name):
    with patch(ARCHITECTURES[name].build()) as one:
        rows = [line.split() for line in one.report().splitlines()[2:]]
    kinds = {row[0].rpartition(".layers.")[0] + row[0].rpartition(".")[2]: row[1] for row in rows}
    assert kinds == {
        "model.encoderself_attn": "full_attention",
        "model.decoderself_attn": "full_attention",
        "model.decoderencoder_attn": "cross_attention",
    }


def test_the_report_names_what_cannot_be_patched():
    network = LLAMA.build()

    class OldAttention(nn.Module):
        pass

    network.model.layers[1].extra = OldAttention()
    with patch(network) as one:
        row = next(line for line in one.report().splitlines() if line.startswith("model.layers.1.extra"))
    assert "left alone: takes no attention from transformers' AttentionInterface" in row
    with pytest.raises(NotImplementedError, match=r"extra \(OldAttention\)"):
        patch(network, layers="*.extra")


def test_a_patched_layer_stays_patched_whatever_the_models_implementation():
    """As when continuous batching switches the implementation of a model behind its user's back."""
    network, inputs = LLAMA.build(), LLAMA.inputs("left")
    with patch(network, scaling="none"):
        wanted = logits(network, **inputs)
        for implementation in ("sdpa", "eager"):
            network.set_attn_implementation(implementation)
            seen = inputs["attention_mask"].bool()
            torch.testing.assert_close(logits(network, **inputs)[seen], wanted[seen], atol=1e-3, rtol=1e-3)


def test_a_copy_of_a_patched_model_is_its_own():
    network = LLAMA.build()
    own = logits(network)
    one = patch(network, scaling="per_head")
    twin = copy.deepcopy(network)
    with torch.no_grad():
        twin.model.layers[0].self_attn.tritonattn.scaling.theta.fill_(1.0)
    seen = LLAMA.inputs("left")["attention_mask"].bool()
    torch.testing.assert_close(logits(network)[seen], own[seen], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(logits(twin)[seen], own[seen], atol=1e-2)
    patched(twin).undo()
    assert torch.equal(logits(twin), own)
    assert patched(network) is one


def test_a_patched_model_and_its_cache_are_pickled(tmp_path):
    network, ids = LLAMA.build(), LLAMA.inputs()["input_ids"]
    with patch(network, scaling="key_norm_mean", gain=torch.ones(4, 1)), torch.no_grad():
        cache = network(input_ids=ids[:, :-1], use_cache=True).past_key_values
        torch.save((network, cache), tmp_path / "whole.pt")
        wanted = network(input_ids=ids[:, -1:], past_key_values=cache).logits
    again, cache = torch.load(tmp_path / "whole.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids[:, -1:], past_key_values=cache).logits, wanted)
    patched(again).undo()
    assert torch.equal(logits(again), logits(network))


@pytest.mark.parametrize("scaling", ["per_head", "ssmax", "power_law", "learned_cosine", tritonattn.nn.SSMax])
def test_what_is_learned_trains_with_the_model(scaling):
    network, ids = LLAMA.build(), LLAMA.inputs()["input_ids"]
    before = {name for name, _ in network.named_parameters()}
    with patch(network, scaling=scaling, gain=torch.ones(4, 1)) as one:
        added = {name: x for name, x in network.named_parameters() if name not in before}
        assert {name.split(".tritonattn.")[0] for name in added} == {FIRST, SECOND}
        assert {id(own.scaling) for own in one.layers.values()}.__len__() == 2
        optimizer = torch.optim.SGD(added.values(), lr=1e-3)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = network(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert all(x.grad is not None for x in added.values() if x.requires_grad)
        assert losses[-1] < losses[0]


def test_a_given_module_is_copied_for_every_layer():
    given = tritonattn.nn.PerHead("key_count", heads=4)
    with patch(LLAMA.build(), scaling=given) as one:
        modules = [own.scaling for own in one.layers.values()]
    assert given not in modules
    assert modules[0] is not modules[1]
    assert all(type(module) is tritonattn.nn.PerHead for module in modules)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_the_backend_reaches_the_call(backend):
    architecture = LLAMA
    network, inputs = architecture.build(), architecture.inputs()
    wanted = gradients(network, architecture, inputs)
    seen = []
    with patch(network, backend=backend) as one, one.watch(lambda *call: seen.append(call[3]["backend"])):
        got = gradients(network, architecture, inputs)
    assert seen == [backend] * 2
    for name in wanted:
        assert (got[name] - wanted[name]).norm() <= 1e-3 * wanted[name].norm()


def test_dropout_of_a_training_model_is_honoured():
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA.arguments, attention_dropout=0.5))
    inputs = LLAMA.inputs()
    with patch(network):
        network.train()
        torch.manual_seed(0)
        first = logits(network, **inputs)
        assert not torch.equal(logits(network, **inputs), first)
        torch.manual_seed(0)
        assert torch.equal(logits(network, **inputs), first)
        network.eval()
        assert torch.equal(logits(network, **inputs), logits(network, **inputs))


def test_gradient_checkpointing():
    network, architecture = LLAMA.build(), LLAMA
    wanted = gradients(network, architecture, architecture.inputs("left"))
    with patch(network, scaling="sqrt_dim"):
        network.train()
        network.gradient_checkpointing_enable({"use_reentrant": False})
        got = gradients(network, architecture, architecture.inputs("left"))
    for name in wanted:
        assert (got[name] - wanted[name]).norm() <= 1e-3 * wanted[name].norm()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("scaling", "layers"), [("key_norm_mean", None), ("ssmax", [1])])
def test_a_compiled_model_trains(scaling, layers):
    network, ids = LLAMA.build("sdpa"), LLAMA.inputs()["input_ids"]

    def gradient(run) -> torch.Tensor:
        network.zero_grad()
        run(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return torch.cat([x.grad.flatten() for x in network.parameters() if x.grad is not None])

    with patch(network, scaling=scaling, layers=layers):
        wanted = gradient(network)
        torch._dynamo.reset()
        got = gradient(torch.compile(network, fullgraph=True, backend="aot_eager"))
    assert (got - wanted).norm() <= 1e-4 * wanted.norm()


def test_a_model_inside_another_module_is_patched_too():
    network = LLAMA.build()
    wanted = logits(network, **LLAMA.inputs())
    outer = nn.Sequential(network)
    with patch(outer, scaling="none") as one:
        assert list(one.layers) == [f"0.{FIRST}", f"0.{SECOND}"]
        assert not torch.allclose(logits(network, **LLAMA.inputs()), wanted, atol=1e-2)
    assert torch.equal(logits(network, **LLAMA.inputs()), wanted)


MODEL_SCALINGS = {
    "llama": 8**-0.5, "gemma3": 3**-0.5, "granite": 0.3, "opt": 1.0, "gpt2": 8**-0.5, "whisper": 1.0, "clip": 8**-0.5,
}  # fmt: skip


@pytest.mark.parametrize("scaling", ["key_count", "key_norm_mean", "cosine", 0.05, None])
@pytest.mark.parametrize("name", MODEL_SCALINGS)
def test_the_one_rule(name, scaling):
    """logit = model_scaling * sqrt(D) * factor * (q . k), recomputed densely from q and k; cosine stands alone."""
    architecture, own = ARCHITECTURES[name], MODEL_SCALINGS[name]
    network, inputs = architecture.build(), architecture.inputs()
    checked = []

    def compare(module, query, key, arguments, aux):
        q, k = query.double(), key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        parts = arguments.keys() & {"causal", "window", "key_ranges", "mask"}
        visible = Visibility.of(query, key, **{part: arguments[part] for part in parts}).dense()
        lengths = (k.norm(dim=-1)[:, :, None] * visible).sum(-1, keepdim=True)
        count = visible.sum(-1, keepdim=True)
        dim = q.shape[-1]
        factor = {
            "key_count": own * math.sqrt(dim) / count,
            "key_norm_mean": own * math.sqrt(dim) / (lengths / count),
            "cosine": math.sqrt(dim) / (q.norm(dim=-1)[..., None] * k.norm(dim=-1)[:, :, None]),
            0.05: own * math.sqrt(dim) * 0.05,
            None: own,
        }[scaling]
        wanted = ((q @ k.mT) * factor).masked_fill(~visible, -math.inf).amax(-1)
        torch.testing.assert_close(aux.max_logit.double(), wanted, atol=1e-3, rtol=1e-4)
        checked.append(module)

    with patch(network, scaling=scaling) as one, one.watch(compare):
        architecture.outputs(network, inputs)
    assert len(checked) >= 2


def test_the_name_alone_works(tmp_path):
    """set_attn_implementation and from_pretrained(attn_implementation=...), after the import."""
    network = LLAMA.build()
    wanted = logits(network)
    network.set_attn_implementation(NAME)
    got = logits(network)
    seen = LLAMA.inputs("left")["attention_mask"].bool()
    torch.testing.assert_close(got[seen], wanted[seen], atol=1e-3, rtol=1e-3)
    network.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
    assert again.config._attn_implementation == NAME
    assert torch.equal(logits(again.eval()), got)


def test_continuous_batching_without_masks_is_refused_by_name():
    network, q = LLAMA.build("sdpa"), torch.randn(1, 4, 3, 8)
    with patch(network), pytest.raises(NotImplementedError, match="continuous batching"):
        tritonattn.huggingface.attention_forward(
            network.model.layers[0].self_attn, q, q, q, None, read_index=torch.zeros(3, dtype=torch.int64)
        )


@pytest.mark.skipif(VERSION < (5, 24), reason="it asks the hub for a tokenizer, or takes no small sizes")
@pytest.mark.parametrize("scaling", ["sqrt_dim", "key_norm_mean"])
def test_continuous_batching_with_masks(scaling):
    """Whole models are refused by name; with the dense masks of sdpa every request gives what it gives alone."""
    network, ids = LLAMA.build("sdpa"), LLAMA.inputs()["input_ids"]
    requests = [ids[0].tolist(), ids[1, :7].tolist()]
    options = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    batching = {"generation_config": options, "continuous_batching_config": small, "warmup": False}
    with patch(network, scaling=scaling):
        alone = [network.generate(torch.tensor([one]), generation_config=options)[0, len(one) :] for one in requests]
        with pytest.raises(ValueError, match="tritonattn is not supported for continuous batching"):
            network.generate_batch(requests, **batching)
        network.set_attn_implementation("sdpa")
        batch = network.generate_batch(requests, **batching).values()
    assert sorted(one.generated_tokens for one in batch) == sorted(one.tolist() for one in alone)
