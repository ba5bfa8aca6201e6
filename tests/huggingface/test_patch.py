"""`patch`: its changes, the layers that it leaves alone, its report and its undo."""

import dataclasses

import pytest
import torch
import transformers
from torch import nn

from tests.huggingface.architectures import ARCHITECTURES
from tests.support.pairs import in_turn, pairwise
from tests.support.refusals import refuses
from tritonattn.huggingface import NAME, patch, patched, restore
from tritonattn.nn import PerHead, QueryAdaptiveSSMax, SSMax
from tritonattn.scaling import Inkling, Inkling2, Llama4, Ministral3

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
LLAMA = ARCHITECTURES["llama"]
FIRST, SECOND = "model.layers.0.self_attn", "model.layers.1.self_attn"


def logits(network, **inputs):
    with torch.no_grad():
        return network(**(inputs or LLAMA.inputs("left"))).logits


def state(network) -> dict:
    """Everything that a patch could leave behind in a model."""
    modules = list(network.modules())
    configs = {id(m.config): m.config for m in modules if hasattr(m, "config")}
    return {
        "parameters": [name for name, _ in network.named_parameters()],
        "modules": [(name, type(m), id(getattr(m, "config", None))) for name, m in network.named_modules()],
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in modules],
        "attributes": [set(vars(m)) for m in modules],
        "implementations": {key: getattr(one, "_attn_implementation", None) for key, one in configs.items()},
        "configs": {key: one.to_dict() for key, one in configs.items()},
    }


def test_the_context_undoes_on_an_error():
    network = LLAMA.build()
    with pytest.raises(KeyboardInterrupt), patch(network, scaling="none") as one:
        raise KeyboardInterrupt
    assert patched(network) is None
    refuses("RuntimeError: ~ this patch has been undone", one.__enter__)
    refuses("ValueError: model: expected scalings of layers in config.tritonattn, got none", restore, network)


def test_who_watches_goes_on_after_another_has():
    network, calls = LLAMA.build(), []
    with patch(network) as one, one.watch(lambda *_: calls.append("outer")):
        with one.watch(lambda *_: calls.append("inner")):
            logits(network)
        logits(network)
    assert calls == ["inner"] * 2 + ["outer"] * 2


@pairwise(implementation=["eager", "sdpa", NAME], padding=["none", "left", "holes"])
def test_layers_left_out_keep_their_numbers(implementation, padding):
    network, inputs = LLAMA.build(implementation), LLAMA.inputs(padding)
    layers, outputs = [layer.self_attn for layer in network.model.layers], []
    for layer in layers:
        layer.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
    wanted, configs = logits(network, **inputs), [layer.config for layer in layers]
    for scaling in ("none", "sqrt_dim"):
        with patch(network, scaling=scaling, layers=[1]):
            got = logits(network, **inputs)
            assert torch.equal(outputs[-2], outputs[0])
            assert layers[0].config is network.config or implementation == NAME
            assert network.config._attn_implementation == implementation
    visible = inputs.get("attention_mask", torch.ones(2, 13)).bool()
    assert [layer.config for layer in layers] == configs
    torch.testing.assert_close(outputs[-1][visible], outputs[1][visible], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[visible], wanted[visible], atol=1e-3, rtol=1e-3)


@in_turn(
    name=["llama", "mistral", "gemma3", "llama4", "whisper", "bart", "gpt2", "gpt_neox"],
    implementation=["sdpa", "eager"],
)
def test_a_part_of_a_model_generates_as_before(name, implementation):
    """Llama's prefill of a static cache has no mask: sdpa shows the upper left corner."""
    architecture, options = ARCHITECTURES[name], {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    network, inputs = architecture.build(implementation), architecture.inputs("none" if name == "llama" else "left")
    if name == "llama":
        options |= {"cache_implementation": "static", "disable_compile": True}
    wanted = network.generate(**inputs, **options)
    with patch(network, layers=[1]):
        assert torch.equal(network.generate(**inputs, **options), wanted)


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        (None, {FIRST: "none", SECOND: "none"}),
        (1, {SECOND: "none"}),
        (-1, {SECOND: "none"}),
        ([-2, -1], {FIRST: "none", SECOND: "none"}),
        ([1, 0], {FIRST: "none", SECOND: "none"}),
        ("*.1.*", {SECOND: "none"}),
        ("model.layers.1", {SECOND: "none"}),
        (FIRST, {FIRST: "none"}),
        ({0: {}, 1: "dim"}, {FIRST: "none", SECOND: "dim"}),
        ({"*": {}, 0: {"scaling": "cosine", "gain": 2.0}}, {FIRST: "cosine", SECOND: "none"}),
        ({0: {"gain": 2.0}}, {FIRST: "none"}),
    ],
)
def test_layers_by_number_name_pattern_and_dict(layers, chosen):
    with patch(LLAMA.build(), scaling="none", layers=layers) as one:
        assert {name: layer.scaling.name for name, layer in one.layers.items()} == chosen
    assert one.layers == {}


def test_the_last_layer_is_that_of_each_stack_and_of_a_part():
    network = ARCHITECTURES["whisper"].build()
    ends = {"model.encoder.layers": 1, "model.decoder.layers": 1}
    with patch(network, layers=-1) as one:
        assert {name.rpartition(".layers.")[0] + ".layers": int(name.split(".")[3]) for name in one.layers} == ends
        assert len(one.layers) == 3  # the decoder's has cross attention too
    with patch(LLAMA.build().model.layers, layers=-1) as one:
        assert list(one.layers) == ["1.self_attn"]
    long = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA.arguments | {"num_hidden_layers": 11}))
    with patch(long, layers="model.layers.1") as one:
        assert list(one.layers) == [SECOND]


ROPE = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.3, "original_max_position_embeddings": 8}
INKLING = {"log_scaling_alpha": 0.2, "log_scaling_n_floor": 4}
NAMED = [
    ({"attn_scale": 0.4, "floor_scale": 16}, Llama4(0.4, 16)),
    ({"rope_parameters": ROPE}, Ministral3(0.3, 8)),
    (INKLING, Inkling(0.2, 4)),
    ({**INKLING, "qk_l2_clip_threshold": 3.0}, Inkling2(0.2, 4, 3.0)),
    ({"log_scaling_alpha": 0.2, "log_scaling_n_floor": None}, Inkling()),
]


@pytest.mark.parametrize(("entries", "made"), NAMED, ids=str)
def test_a_mode_by_name_takes_the_settings_of_the_model_s_config(entries, made):
    network = LLAMA.build()
    for name, value in entries.items():
        setattr(network.config, name, value)
    with patch(network, scaling=made.name) as one:
        assert [layer.scaling for layer in one.layers.values()] == [made, made]
        assert one.layers[FIRST].to_config()["scaling"] == {"name": made.name, **dataclasses.asdict(made)}


def test_a_temperature_by_name_is_the_model_s():
    """In Llama 4, with its temperature turned off; with it a second one is refused."""
    architecture = ARCHITECTURES["llama4"]
    inputs, network = architecture.inputs("none"), architecture.build()
    wanted = logits(network, **inputs)
    refuses("ValueError: scaling ~ 'llama4' ~ llama4_text ~ 'sqrt_dim'", patch, network, "llama4", layers=[1])
    network.config.attn_temperature_tuning = network.model.layers[1].self_attn.attn_temperature_tuning = False
    plain = logits(network, **inputs)
    with patch(network, scaling="llama4", layers=[1]) as one:  # the layer without rotary embedding
        assert next(iter(one.layers.values())).scaling == Llama4(0.5, 4)
        torch.testing.assert_close(logits(network, **inputs), wanted, atol=1e-3, rtol=1e-3)
    assert (plain - wanted).abs().max() > 1e-1


STARTS = ["per_head", "ssmax", "power_law", "learned_log_power", SSMax, QueryAdaptiveSSMax(4, 8, mode="sqrt_dim")]


@pytest.mark.parametrize("scaling", STARTS, ids=str)
def test_learned_scalings_start_where_the_model_was_and_learn(scaling):
    network, tokens = LLAMA.build(), LLAMA.inputs("none")["input_ids"]
    wanted = network(tokens, labels=tokens).loss.item()
    with patch(network, scaling=scaling) as one:
        loss = network(tokens, labels=tokens).loss
        assert loss.item() == pytest.approx(wanted, abs=1e-4)
        learned = [x for layer in one.layers.values() for x in layer.parameters() if x.requires_grad]
        assert all(gradient.any() for gradient in torch.autograd.grad(loss, learned))


@pytest.mark.parametrize("learned", [{"scaling": "ssmax"}, {"gain": torch.ones(4, 1)}], ids=str)
def test_an_optimizer_from_before_the_patch_is_told_what_it_leaves_out(learned):
    network = LLAMA.build()
    before = torch.optim.SGD(network.parameters(), lr=0.1)
    with patch(network, **learned):
        before.step()
        with pytest.warns(UserWarning, match="optimizer: expected the parameters that a patch has added .* got a SGD"):
            before.step()


def test_a_gain_made_without_memory_is_reset_to_the_values_given():
    with torch.device("meta"):
        network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA.arguments))
    given = {0: torch.tensor([[1.0], [2.0], [3.0], [4.0]]), 1: torch.tensor(0.5)}
    with patch(network, layers={i: {"scaling": "ssmax", "gain": gain} for i, gain in given.items()}) as one:
        assert {x.device.type for x in network.parameters()} == {"meta"}
        network.to_empty(device="cpu")
        for layer in one.layers.values():
            layer.reset_parameters()
        first, second = (layer.gain for layer in one.layers.values())
        assert torch.equal(first, given[0])
        assert torch.equal(second, given[1].reshape(1))  # FSDP takes no parameter without an axis


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": [7]}, ValueError, "layers: expected numbers from -2 to 1, names .*self_attn.*got 7"),
        ({"layers": [-3]}, ValueError, "layers: expected numbers from -2 to 1, .*self_attn.*got -3"),
        ({"layers": ["lm_head"]}, ValueError, "lm_head"),
        ({"layers": []}, ValueError, "at least one"),
        ({"layers": [1.5]}, TypeError, "float"),
        ({"layers": {0: {"scalling": 1}}}, ValueError, "scalling"),
        ({"scaling": "ssmx"}, ValueError, "scaling: expected one of .*did you mean 'ssmax'"),
        ({"scaling": torch.ones(4)}, TypeError, r"scaling: expected .* \(gain= takes a tensor\), got a torch.float32"),
        ({"scaling": QueryAdaptiveSSMax}, TypeError, r"write QueryAdaptiveSSMax\(heads=\.\.\., head_dim=\.\.\.\)"),
        ({"mode": "ssmax"}, TypeError, r"^patch: expected scaling= \(a name in SCALINGS, .*, got mode="),
        ({"scaling": "ssmax", "layers": {0: "dim"}}, ValueError, "scaling: expected a layer that takes it, got str"),
        ({"gain": 2.0, "layers": {0: {"gain": 1.0}}}, ValueError, "gain: expected a layer that takes it, got float 2"),
        ({"scaling": PerHead("key_count", heads=3)}, ValueError, "scaling: expected PerHead of 4 heads, got one of 3"),
        ({"gain": torch.ones(3, 1)}, ValueError, r"gain: .*\[4, 1\], got \[3, 1\]"),
        ({"gain": torch.ones(4, 1, dtype=torch.int64)}, TypeError, "gain: .*int64"),
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
    network = LLAMA.build().train()
    with patch(network, layers=[0], scaling="per_head"):
        assert all(module.training for module in network.modules())
        network.eval()
        assert not any(module.training for module in network.modules())
        for model in (network, network.model):
            refuses("ValueError: ~ undo", patch, model, layers=[1])


def test_models_without_the_interface_are_refused_by_name():
    """transformers at most warns, and goes on with the model's attention."""
    config = transformers.BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=9)
    bloom = r"Bloom.*: BloomAttention .*AttentionInterface"
    network = transformers.BloomForCausalLM(config)
    for ask in (patch, lambda network: network.set_attn_implementation(NAME)):
        with pytest.raises(NotImplementedError, match=bloom):
            ask(network)
    for model in (transformers.BloomForCausalLM, transformers.BloomModel):
        network = model._from_config(config, attn_implementation=NAME)
        with pytest.raises(NotImplementedError, match=bloom):
            network(torch.ones(1, 3, dtype=torch.int64))
        network.config._attn_implementation = "eager"
        network(torch.ones(1, 3, dtype=torch.int64))
    refuses("ValueError: Linear: no attention module", patch, nn.Linear(2, 2))
    refuses("TypeError: ~ model", patch, "llama")


def test_models_that_select_keys_are_refused_by_name():
    """Their indexer reads a dense mask, and their layers hand sparse indices on."""
    if not hasattr(transformers, "MistralLarge4TextConfig"):
        pytest.skip("a newer transformers has it")
    config = transformers.MistralLarge4TextConfig(
        **{"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0},
        **{"num_key_value_heads": 2, "intermediate_size": 16, "first_k_dense_replace": 1, "kv_lora_rank": 8},
        **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "index_head_dim": 8, "index_n_heads": 2},
    )
    network = transformers.AutoModel.from_config(config)
    for ask in (patch, lambda network: network.set_attn_implementation(NAME)):
        with pytest.raises(NotImplementedError, match="MistralLarge4TextAttention selects keys by an indexer"):
            ask(network)


@pytest.mark.parametrize(
    ("name", "part"), [("llama", "model.layers.1"), ("bart", "model.decoder")], ids=["llama", "bart"]
)
def test_a_part_without_its_model_is_patched_and_saved_with_it(name, part, tmp_path):
    """The rest of the model, which shares its config, keeps its implementation and its masks."""
    architecture = ARCHITECTURES[name]
    network, inputs = architecture.build(), architecture.inputs()
    network.save_pretrained(tmp_path)  # which writes the config's architectures
    with torch.no_grad():
        with patch(network, scaling="none", layers=part) as one:
            wanted, names = architecture.outputs(network, inputs), list(one.layers)
        before = state(network)
        one = patch(network.get_submodule(part), scaling="none")
        network.save_pretrained(tmp_path)
        again = type(network).from_pretrained(tmp_path, attn_implementation="eager").eval()
        assert patched(again) is not None
        assert list(patched(again).layers) == names
        assert network.config._attn_implementation == "eager"
        for patched_alike in (again, network):
            torch.testing.assert_close(architecture.outputs(patched_alike, inputs), wanted, atol=1e-3, rtol=1e-3)
    one.undo()
    assert state(network) == before
