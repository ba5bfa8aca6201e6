"""One layer: its formula, what it reads of a device, and what is refused by name."""

import itertools

import pytest
import torch
import transformers
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.server_args import ServerArgs

from tests.serving.attended import NoHostRead
from tests.stub import installed
from tests.support.device_work import values_unread
from tritonattn.integrations.sglang import plugin
from tritonattn.scaling import Grok2

from .layer import Layer

plugin.register()
plugin.register()  # SGLang may load it more than once
TOLERANCE = 1e-5
# Prompts; later chunks of one and of many tokens; decode steps.
STEPS = [([33, 40], [33, 40]), ([1, 57], [34, 97]), ([1, 1], [35, 98])]
SINKS = torch.linspace(-1, 2.5, 8)
WINDOW = {"sliding_window_size": 23}
CAPPED = Grok2(20, after_softcap=True)
CHUNK = {"use_irope": True, "attention_chunk_size": 32}
CASES = {  # config.tritonattn, what SGLang gives to the layer, and arguments of `exact` besides the settings
    "sqrt_dim": ({"scaling": "sqrt_dim"}, {}, {}),
    "log_key_count": ({"scaling": "log_key_count"}, {}, {}),
    "key_norm_mean": ({"scaling": "key_norm_mean", "gain": 1.5}, {}, {}),
    "cosine": ({"scaling": "cosine"}, {}, {}),
    "window": ({"scaling": "key_norm_mean"}, WINDOW, {"window": 24}),
    "cells of windows": ({"scaling": "key_norm_mean"}, WINDOW | {"swa": True}, {"window": 24}),
    "chunks": ({"scaling": "log_key_count"}, CHUNK, {"chunk": 32}),
    "norms in chunks": ({"scaling": "key_norm_mean"}, CHUNK, {"chunk": 32}),
    "chunks in cells of windows": ({"scaling": "key_norm_max"}, CHUNK | {"swa": True}, {"chunk": 32}),
    "positions without chunks": ({"scaling": "log_key_count"}, {"use_irope": True}, {}),
    "softcap": ({"scaling": "log_key_count"}, {"logit_cap": 2.0}, {"softcap": 2.0}),
    "sinks": ({"scaling": "log_key_count"}, {"sinks": SINKS}, {"sinks": SINKS.double()}),
    "pages of 32": ({"scaling": "key_norm_mean"}, {"page": 32}, {}),
    "Grok's temperature": ({}, {"xai_temperature_len": 20}, {"scaling": "grok2:20"}),
    "behind a softcap": (
        {},
        {"xai_temperature_len": 20, "logit_cap": 1.0},
        {"scaling": Grok2(20, after_softcap=True), "softcap": 1.0},
    ),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_steps_compute_the_formula(case):
    settings, given, arguments = CASES[case]
    found = Layer(settings, torch.float32, **given).run(STEPS)
    assert len(found) == 6
    assert max(x.error(**settings, **arguments) for x in found) < TOLERANCE
    assert max(x.error(window=3) for x in found) > 100 * TOLERANCE


@pytest.mark.parametrize("given", [{}, WINDOW, WINDOW | {"swa": True}, CHUNK | {"swa": True}])
@pytest.mark.parametrize("mode", ["sqrt_dim", "log_key_count", "key_norm_mean", "cosine"])
@torch.no_grad()
def test_a_step_reads_no_value_and_its_pages_once(mode, given, monkeypatch):
    """Kernels are launched on a stub of NVIDIA's driver, as shapes alone decide; CPU tensors are its memory."""
    monkeypatch.setattr("tritonattn.calls.paged_statistics.launches", lambda *x: True)  # as of a GPU's tensors
    layer, shapes = Layer({"scaling": mode, "backend": "triton"}, **given), {}
    pages = layer.backend._pages(0)[0]
    for rows, keys in (([1, 1, 1], [5, 40, 300]), ([1, 1, 1], [9, 1, 77]), ([1, 1, 30], [70, 2, 60])):
        batch, launches = layer.batch(rows, keys), []
        with installed().active(90, launches.append), values_unread(), NoHostRead(pages):
            layer.step(**batch)
        readers = [
            x.name
            for x in launches
            if pages.data_ptr() in [a.data_ptr() for a in x.arguments if isinstance(a, torch.Tensor)]
        ]
        assert readers == ["attention_decode" if max(rows) == 1 else "attention_forward"]
        shapes.setdefault(tuple(rows), []).append([(x.name, x.grid) for x in launches])
    assert shapes[(1, 1, 1)][0] == shapes[(1, 1, 1)][1]
    assert installed().messages() == []


@pytest.mark.parametrize("mode", ["sqrt_dim", "key_norm_mean"])
@torch.no_grad()
def test_bits_do_not_depend_on_the_batch(mode):
    layers = [Layer({"scaling": mode, "batch_invariant": True}, torch.float32) for _ in range(2)]
    batch = layers[0].batch([90, 60], [90, 60])
    together = layers[0].step(**batch)[:90]
    for start, end in itertools.pairwise([0, 1, 30, 31, 89, 90]):
        part = layers[1].batch([end - start], [end])
        for name in "qkv":
            part[name].copy_(batch[name][start:end])
        assert torch.equal(layers[1].step(**part), together[start:end])


def test_layers_are_refused_by_name():
    arguments = {"enable_deterministic_inference": True, "load_format": "auto", "json_model_override_args": "{}"}
    deterministic = {"server_args": type("Arguments", (), arguments)}
    for settings, given, error, message in (
        ({}, {"attn_type": AttentionType.ENCODER_ONLY}, NotImplementedError, "attn_type AttentionType.DECODER, got"),
        ({}, {"is_cross_attention": True}, NotImplementedError, "is_cross_attention False, got True at model.0.attn"),
        ({}, {"logit_capping_method": "x"}, NotImplementedError, "logit_capping_method tanh, got x"),
        (
            {},
            {"attention_chunk_size": 24},
            NotImplementedError,
            "attention_chunk_size a multiple of page_size 16, got 24",
        ),
        ({}, {"runner": {"dtype": torch.float16}}, NotImplementedError, "torch.float16, got torch.bfloat16"),
        ({"scaling": "dim"}, {"xai_temperature_len": 9}, ValueError, "expected None at .* Grok 2's temperature"),
        ({"scaling": "ssmax"}, {}, ValueError, "'ssmax': use tritonattn.huggingface.patch"),
        (
            {"batch_invariant": False},
            {"runner": deterministic},
            ValueError,
            "deterministic-inference, got False",
        ),
        ({"layers": {"model.7.attn": {"scaling": "none"}}}, {}, ValueError, "expected the name of one attention layer"),
        ({"layers": {"model.0": {"scaling": "ssmax"}}}, {}, ValueError, r"expected weights \{'scaling.s': \[8\]\}"),
    ):
        with pytest.raises(error, match=message):
            Layer(settings, **given)
    layer = Layer({"scaling": "sqrt_dim"})
    batch = layer.batch([1], [9])
    with pytest.raises(NotImplementedError, match="keys of their own, got none at 0"):
        layer.step(**batch | {"k": None, "v": None})
    layer.backend.init_forward_metadata(batch["batch"])
    with pytest.raises(NotImplementedError, match="a layer without k_rope"):
        layer.backend.forward(batch["q"], batch["k"], batch["v"], layer.layer, batch["batch"], k_rope=batch["k"])


SERVERS = {  # settings of SGLang, and the message
    "another backend": ({"attention_backend": "torch_native"}, "expected tritonattn or none .* got torch_native"),
    "for decoding": ({"decode_attention_backend": "triton"}, "decode_attention_backend: expected tritonattn or none"),
    "pages": ({"page_size": 8}, "page_size a multiple of 16, got 8"),
    "8-bit caches": ({"kv_cache_dtype": "fp8_e4m3"}, "kv_cache_dtype auto or float32, got fp8_e4m3"),
    "speculation": ({"speculative_algorithm": "NGRAM"}, "speculative_algorithm None, got NGRAM"),
    "pipelines": ({"pp_size": 2}, "pp_size 1, got 2"),
    "norms that move": ({"enable_hierarchical_cache": True}, "enable_hierarchical_cache False, got True"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=96
    )
    config.architectures, config.tritonattn = ["LlamaForCausalLM"], {"scaling": "key_norm_mean"}
    config.save_pretrained(folder)
    return str(folder)


def resolved(checkpoint, **settings) -> ServerArgs:
    server = ServerArgs(model_path=checkpoint, device="cpu", skip_tokenizer_init=True, dtype="float32", **settings)
    server.resolve_once()
    return server


@pytest.mark.parametrize("case", SERVERS)
def test_servers_are_refused_by_name(case, checkpoint):
    settings, message = SERVERS[case]
    with pytest.raises((ValueError, NotImplementedError), match=message):
        resolved(checkpoint, **settings)


def test_other_versions_are_refused(checkpoint, monkeypatch):
    monkeypatch.setattr("tritonattn.integrations.serving.versions.version", lambda name: "0.6.0")
    with pytest.raises(ImportError, match=r"sglang: expected version >=0.5.23,<0.6, got 0.6.0"):
        resolved(checkpoint)
