"""One layer: what it reads of a device, what it refuses, which backend is chosen."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import set_current_vllm_config

from tests.stub import installed
from tests.support.device_work import values_unread
from tritonattn.integrations.vllm import NAME as TRITONATTN
from tritonattn.integrations.vllm import backend, plugin
from tritonattn.integrations.vllm.backend import TritonattnBackend
from tritonattn.integrations.vllm.pages import keys_and_values

from .attended import HEAD_DIM, NoHostRead
from .layer import NAME, Layer

plugin.register()
plugin.register()  # vLLM may load it more than once
MODES = ("sqrt_dim", "log_key_count", "key_norm_mean", "cosine")


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_step_reads_no_value_and_its_pages_once(mode, window, monkeypatch):
    """Kernels are launched on a stub of NVIDIA's driver, as shapes alone decide; CPU tensors are its memory."""
    monkeypatch.setattr("tritonattn.calls.paged_statistics.launches", lambda *x: True)  # as of a GPU's tensors
    split = backend.split_decodes_and_prefills  # vLLM's, of offsets that lie on the host too
    layer = Layer({"scaling": mode, "backend": "triton"}, per_layer_sliding_window=window)
    shapes = {}
    for rows, keys in (([1, 1, 1], [5, 40, 300]), ([1, 1, 1], [9, 1, 77]), ([1, 1, 30], [70, 2, 60])):
        batch, launches = layer.batch(rows, keys), []
        counts = split(batch["common"], decode_threshold=1)
        monkeypatch.setattr(backend, "split_decodes_and_prefills", lambda *_, counts=counts, **__: counts)
        with installed().active(90, launches.append), values_unread(), NoHostRead(layer.cache):
            layer.parts(**batch)[1]()
        pages = layer.cache.data_ptr()
        readers = [
            x.name for x in launches if pages in [a.data_ptr() for a in x.arguments if isinstance(a, torch.Tensor)]
        ]
        assert readers == ["attention_decode", "attention_forward"][: 1 + (max(rows) > 1)]
        shapes.setdefault(tuple(rows), []).append([(x.name, x.grid) for x in launches])
    assert shapes[(1, 1, 1)][0] == shapes[(1, 1, 1)][1]
    assert installed().messages() == []


@torch.no_grad()
def test_padding_is_written_nowhere():
    layer = Layer({"scaling": "sqrt_dim"}, "float32")
    batch = layer.batch([1, 1], [20, 40])
    slots, common = batch["common"].slot_mapping, batch["common"]
    common.slot_mapping, common.num_actual_tokens = torch.cat([slots, torch.full((3,), -1)]), len(slots) + 3
    k, v = (torch.cat([batch[name], torch.full((3, *batch[name].shape[1:]), torch.nan)]) for name in "kv")
    impl = layer.layer.impl
    impl._write((k, v), keys_and_values(layer.cache, HEAD_DIM), layer.builder.build(0, common))
    written = layer.cache.transpose(1, 2).flatten(0, 1)[slots]
    assert torch.equal(written, torch.cat([batch["k"], batch["v"]], -1))
    assert layer.cache[1:].isfinite().sum() == written.numel()


def test_refused_by_name(monkeypatch):
    connector = SimpleNamespace(is_kv_transfer_instance=True)
    for given, message in (
        ({"alibi_slopes": [0.5] * 8}, "alibi_slopes None, got"),
        ({"attn_type": "encoder_only"}, "attention type encoder_only not supported"),
        ({"kv_sharing_target_layer_name": "x"}, "kv_sharing_target_layer_name None, got x"),
        ({"head_size_v": 32}, f"expected an Attention with values of 64, got a Attention with values of 32 at {NAME}"),
        (
            {"engine": {"cache_config.cache_dtype": "float16"}},
            "kv_cache_dtype auto or bfloat16 or fp8 or fp8_e4m3, got float16",
        ),
        ({"engine": {"parallel_config.pipeline_parallel_size": 2}}, "pipeline_parallel_size 1, got 2"),
        ({"engine": {"parallel_config.decode_context_parallel_size": 2}}, "DCP not supported"),
        ({"engine": {"parallel_config.prefill_context_parallel_size": 2}}, "PCP not supported"),
        ({"engine": {"kv_transfer_config": connector}}, f"kv_transfer_config: expected None .* at {NAME}"),
        ({"engine": {"attention_config.use_non_causal": True}}, "non-causal attention not supported"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            Layer({"scaling": "key_norm_mean"}, **given)
    with pytest.raises(ValueError, match=r"'ssmax': use tritonattn.huggingface.patch"):
        Layer({"scaling": "ssmax"})
    with pytest.raises(ValueError, match=r"tritonattn.layers\['model.layers.7.self_attn'\]: expected the name of one"):
        Layer({"layers": {"model.layers.7.self_attn": {"scaling": "none"}}})
    with pytest.raises(ValueError, match=r"expected weights \{'scaling.s': \[8\]\}, got \{\}"):
        Layer({"layers": {"model.layers.0.self_attn": {"scaling": "ssmax"}}})
    layer = Layer({"scaling": "log_key_count"}, engine={"kv_transfer_config": connector})  # reads no norms
    batch = layer.batch([1], [9])
    batch["common"].causal = False
    with pytest.raises(NotImplementedError, match="expected causal attention, got causal=False"):
        layer.builder.build(0, batch["common"])
    monkeypatch.setattr("tritonattn.integrations.serving.versions.version", lambda name: "0.34.1")
    with pytest.raises(ImportError, match=r"vllm: expected version >=0.33.0,<0.34, got 0.34.1"):
        Layer({"scaling": "log_key_count"})
    assert Layer(None).layer.attn_backend.get_name() == "CPU_ATTN"  # as without the plugin, whatever the version


def test_another_backend_is_refused_for_a_patched_model():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import get_attn_backend

    layer = Layer({"scaling": "log_key_count"})
    assert layer.layer.attn_backend is TritonattnBackend
    config = layer.config
    with set_current_vllm_config(config):
        with pytest.raises(NotImplementedError, match="MLA not supported"):
            get_attn_backend(64, torch.bfloat16, "auto", use_mla=True)
        with pytest.raises(NotImplementedError, match="kv_cache_dtype not supported"):
            get_attn_backend(64, torch.bfloat16, "fp8_e5m2")
        with pytest.raises(NotImplementedError, match="multimodal token full attention not supported"):
            get_attn_backend(64, torch.bfloat16, "auto", use_mm_prefix=True)
        with pytest.raises(NotImplementedError, match="head_size not supported"):
            get_attn_backend(520, torch.bfloat16, "auto")
        assert get_attn_backend(512, torch.bfloat16, "auto") is TritonattnBackend
        config.attention_config.backend = AttentionBackendEnum.FLASH_ATTN
        with pytest.raises(
            ValueError, match=f"expected {TRITONATTN} or none .*, got FLASH_ATTN, which does not compute"
        ):
            get_attn_backend(64, torch.bfloat16, "auto")
    config = Layer(None).config
    config.attention_config.backend = AttentionBackendEnum[TRITONATTN]
    with set_current_vllm_config(config):
        assert get_attn_backend(64, torch.bfloat16, "auto") is TritonattnBackend
