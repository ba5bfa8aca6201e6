"""A saved patched model loads as a patched model, or names what is missing."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel

import tritonattn
from tests.huggingface.architectures import ARCHITECTURES, VERSION
from tests.huggingface.test_patch import LLAMA
from tests.support.refusals import refuses
from tritonattn import SCALINGS, Scales, Scaling
from tritonattn.huggingface import NAME, patch, patched, register, restore, unregister
from tritonattn.huggingface.settings import CONFIG_MARK, MARK

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
READS_CONFIG = (
    transformers.LlamaConfig.from_dict({"attn_implementation": "eager"})._attn_implementation == "eager"
)  # as 4.54 does not
SCALING, LEARNED = tritonattn.scaling, tritonattn.nn
_per_head = partial(LEARNED.PerHead, heads=4)
CASES = {
    "arguments": {"scaling": SCALING.QwenLogn(train_length=4), "gain": 2.0, "backend": "sdpa", "batch_invariant": True},
    "part": {"scaling": "key_count", "layers": [1]},
    "dict": {"layers": {0: 0.7, 1: {"scaling": SCALING.Cosine(tau=3.0), "gain": 0.5}}},
    "gain": {"scaling": "key_norm_rms", "gain": torch.tensor([[1.0], [2.0], [3.0], [4.0]])},
    "of heads": {"layers": {0: _per_head(SCALING.LogKeyCount(base=3.0)), 1: LEARNED.SSMax(4, bias=True)}},
    "learned": {"layers": {0: LEARNED.LearnedCosine(4, tau=2.5), 1: LEARNED.QueryAdaptiveSSMax(4, head_dim=8)}},
    "powers": {"layers": {0: "power_law", 1: LEARNED.LearnedLogPower(4, base=5.0)}},
    "nested": {"scaling": LEARNED.Scheduled(_per_head(_per_head("dim")), "dim", steps=5, blend="geometric")},
}


def logits(network, architecture=LLAMA) -> torch.Tensor:
    with torch.no_grad():
        return architecture.outputs(network, architecture.inputs())


def disturb(network) -> None:
    """Move learned values away from their start."""
    for layer in patched(network).layers.values():
        for x in layer.parameters():
            x.data.add_(torch.rand(x.shape, generator=torch.Generator().manual_seed(3)))
        for buffer in layer.buffers():
            buffer.add_(2)


@pytest.mark.parametrize("case", [*CASES, "whisper", "bart", "clip", "gpt2", "vit", "llama4", "t5"])
def test_a_patched_model_comes_back(case, tmp_path):
    architecture = ARCHITECTURES.get(case, LLAMA)
    if not architecture.supported:
        pytest.skip("this version of transformers cannot be patched so")
    network = architecture.build("sdpa")
    plain = logits(network, architecture)
    one = patch(network, **CASES.get(case, {"scaling": "key_norm_mean", "gain": torch.full((4, 1), 1.5)}))
    disturb(network)
    wanted = logits(network, architecture)
    assert not torch.allclose(plain, wanted, atol=1e-3)
    network.save_pretrained(tmp_path)
    again = type(network).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, architecture), wanted)
    assert patched(again).report() == one.report()
    kept, wanted_kept = ([x.batch_invariant for x in p.layers.values()] for p in (patched(again), one))
    assert kept == wanted_kept
    if architecture is LLAMA:
        base = transformers.AutoModel.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            assert torch.equal(network.lm_head(base(**LLAMA.inputs(), use_cache=False).last_hidden_state), wanted)
    patched(again).undo()
    assert torch.equal(logits(again, architecture), plain)


@pytest.mark.parametrize("part", ["whole", "layers", "model inside"])
def test_a_model_of_models_comes_back(part, tmp_path):
    """Settings are saved in the config of the whole, a part of which may have been patched."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=12, patch_size=4, initializer_range=1.0),
        text_config=transformers.LlamaConfig(**LLAMA.arguments),
        image_token_id=60,
        image_token_index=60,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    network = transformers.LlavaForConditionalGeneration(config).eval()
    ids, pixels = torch.tensor([[1, *[60] * 9, 5, 6, 7, 8]]), torch.randn(1, 3, 12, 12)

    def run(one) -> torch.Tensor:
        with torch.no_grad():
            return one(input_ids=ids, pixel_values=pixels).logits

    plain = run(network)
    target = network.model.language_model if part == "model inside" else network
    layers = "*language_model*" if part == "layers" else None
    one = patch(target, scaling="per_head", gain=torch.full((4, 1), 0.3), layers=layers)
    assert len(one.layers) == (4 if part == "whole" else 2)
    wanted = run(network)
    assert not torch.allclose(wanted, plain, atol=1e-2)
    network.save_pretrained(tmp_path)
    one.undo()
    assert torch.equal(run(network), plain)
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(run(again), wanted)
    one = patched(again)
    assert len(one.layers) == (4 if part == "whole" else 2)
    one.undo()
    assert torch.equal(run(again), plain)


def test_learned_parameters_stay_in_float32(tmp_path):
    network = LLAMA.build()
    with patch(network, scaling="per_head", gain=torch.full((4, 1), 1.2345678)) as one:
        disturb(network)
        wanted = {name: layer.state_dict() for name, layer in one.layers.items()}
        network.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    assert again.dtype == torch.bfloat16
    for name, layer in patched(again).layers.items():
        for key, x in layer.state_dict().items():
            assert x.dtype == torch.float32
            assert torch.equal(x, wanted[name][key])
    assert logits(again).isfinite().all()


@contextmanager
def without_tritonattn() -> Iterator[None]:
    """transformers as in a process that has not imported tritonattn.huggingface."""
    unregister(NAME)
    try:
        with pytest.MonkeyPatch.context() as patching:
            for name in ("post_init", "_initialize_missing_keys", "save_pretrained", "set_attn_implementation"):
                if (original := getattr(getattr(PreTrainedModel, name, None), "__wrapped__", None)) is not None:
                    patching.setattr(PreTrainedModel, name, original)
            yield
    finally:
        register()


def test_weights_of_a_patch_are_marked(tmp_path):
    """Unexpected weights are named where the config is not read; `Patched.mark` and unpatched models leave none.

    transformers without tritonattn refuses the model if it reads the config.
    """
    network, folders = LLAMA.build(), [tmp_path / name for name in ("marked", "given", "unmarked", "plain")]
    plain = logits(network)
    with patch(network, scaling="none") as one:
        wanted = logits(network)
        network.save_pretrained(folders[0])
        network.save_pretrained(folders[1], state_dict=network.state_dict())
        one.mark = False
        network.save_pretrained(folders[2])
        assert not hasattr(network, MARK)
        network.load_state_dict(load_file(folders[0] / "model.safetensors"))
    network.save_pretrained(folders[3])
    assert [MARK in load_file(one / "model.safetensors") for one in folders] == [True, True, False, False]
    assert [MARK in (one / "config.json").read_text() for one in folders] == [True, True, False, False]
    load = partial(transformers.LlamaForCausalLM.from_pretrained, output_loading_info=True)
    for folder in folders[:3]:
        again, report = load(folder)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"] or VERSION < (4, 57)  # 4.54 asks the class which to ignore
        assert torch.equal(logits(again.eval()), wanted)
        assert not vars(again.config).keys() & CONFIG_MARK.keys()
    with without_tritonattn():
        for folder, marked in zip(folders, (True, True, False, False), strict=True):
            again, report = load(folder, attn_implementation="eager")
            assert list(report["unexpected_keys"]) == [MARK] * marked
            assert torch.equal(logits(again.eval()), plain)
        with pytest.raises(ValueError, match="tritonattn") if READS_CONFIG else nullcontext():
            load(folders[0])


def test_an_architecture_without_the_layers_says_what_is_missing(tmp_path):
    network = LLAMA.build()
    with patch(network, scaling="none", layers=[1]):
        network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] = 1
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:1]
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    refuses("RuntimeError: ~ model.layers.1.self_attn ~ not applied", logits, again)
    refuses("ValueError: model: expected ~ got a LlamaForCausalLM without model.layers.1.self_attn", restore, again)
    smaller = copy.deepcopy(patch(network, scaling="none", layers=[1]).model.config)  # applied to another model
    smaller.num_hidden_layers = 1
    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.self_attn.*not applied"):
        logits(transformers.AutoModelForCausalLM.from_config(smaller))


@dataclass(frozen=True)
class Halved(Scaling):
    """1 / (2 sqrt(D)) by default."""

    divisor: float = 2.0

    name = "halved"

    def scales(self, q, k, visibility, statistics):
        return Scales(q.shape[-1] ** -0.5 / self.divisor)

    def multiplier(self, q, k, visible):
        return torch.tensor(q.shape[-1] ** -0.5 / self.divisor)


def test_a_custom_scaling(tmp_path, monkeypatch):
    network = LLAMA.build()
    patch(network, scaling=Halved(3.0))
    wanted = logits(network)
    network.save_pretrained(tmp_path)
    refuses("ValueError: ~ SCALINGS['halved']", transformers.AutoModelForCausalLM.from_pretrained, tmp_path)
    monkeypatch.setitem(SCALINGS, "halved", Halved)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), wanted)


@pytest.mark.parametrize("scaling", ["per_head", "ssmax", "learned_log_power", LEARNED.PowerLaw(4, "dim")], ids=str)
def test_weights_without_what_was_learned_are_said_and_start_again(scaling, tmp_path):
    """A learned scaling starts where its patch did: by name at the model."""
    network = LLAMA.build()
    network.save_pretrained(tmp_path)
    with patch(network, scaling=scaling, gain=torch.ones(4, 1)) as one:
        wanted = logits(network)
        network.config.save_pretrained(tmp_path)
        learned = {f"{name}.tritonattn.{key}" for name, layer in one.layers.items() for key in layer.state_dict()}
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == learned
    torch.testing.assert_close(logits(again.eval()), wanted)
