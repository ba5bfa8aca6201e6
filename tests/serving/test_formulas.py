"""One layer's steps against the reference, and under batch invariance against one another."""

import itertools

import pytest
import torch
from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace

from tests.support.eight_bit import quantised
from tritonattn.integrations.vllm import plugin

from .attended import exact
from .layer import PAGES, WIDTH, Layer

plugin.register()
TOLERANCE = 1e-5
# Prompts; a decode step with a later chunk; decode steps.
STEPS = [([33, 40], [33, 40]), ([1, 57], [34, 97]), ([1, 1], [35, 98])]
SINKS = torch.linspace(-1, 2.5, 8)
CASES = {  # settings, what vLLM gives to the layer, and arguments of `exact` besides the settings
    "sqrt_dim": ({"scaling": "sqrt_dim"}, {}, {}),
    "log_key_count": ({"scaling": "log_key_count"}, {}, {}),
    "key_norm_mean": ({"scaling": "key_norm_mean", "gain": 1.5}, {}, {}),
    "cosine": ({"scaling": "cosine"}, {}, {}),
    "window": ({"scaling": "key_norm_mean"}, {"per_layer_sliding_window": 24}, {"window": 24}),
    "softcap": ({"scaling": "log_key_count"}, {"logits_soft_cap": 2.0}, {"softcap": 2.0}),
    "sinks": ({"scaling": "log_key_count"}, {"sinks": SINKS}, {"sinks": SINKS.double()}),
    "pages of 32": ({"scaling": "key_norm_mean"}, {"page": 32}, {}),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_steps_compute_the_formula(case):
    settings, given, arguments = CASES[case]
    found = Layer(settings, "float32", **given).run(STEPS)
    assert len(found) == 6
    assert max(x.error(**settings, **arguments) for x in found) < TOLERANCE
    assert max(x.error(window=3) for x in found) > 100 * TOLERANCE


@pytest.mark.parametrize("mode", ["log_key_count", "key_norm_mean"])
@pytest.mark.parametrize("of_heads", [False, True])
@torch.no_grad()
def test_8_bit_caches_hold_what_vllms_scales_say(mode, of_heads):
    """One scale of keys and one of values, or one a head, as of compressed-tensors."""
    layer = Layer({"scaling": mode}, "float32", engine={"cache_config.cache_dtype": "fp8"})
    scales = torch.tensor([[0.02, 0.03], [0.01, 0.015]])
    for name, scale in zip("kv", scales if of_heads else scales[:, 0], strict=True):
        layer.layer.register_buffer(f"_{name}_scale", scale)
        setattr(layer.layer, f"_{name}_scale_float", float(scale.max()))
    factors = scales[..., None] if of_heads else scales[:, :1, None]
    for out, q, *held in layer.run(STEPS):
        k, v = (quantised(x, factor)[1] for x, factor in zip(held, factors, strict=True))
        torch.testing.assert_close(out.double(), exact(q, k, v, scaling=mode), rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_layers_of_one_step_keep_their_gains():
    layers = {gain: Layer({"scaling": "log_key_count", "gain": gain}, "float32") for gain in (0.5, 1.5)}
    batch = layers[0.5].batch([1, 40], [1, 40])
    step = layers[0.5].builder.build(0, batch["common"])
    for gain, layer in layers.items():
        layer.parts(**batch)[1](step)
        wanted = exact(*(batch[name][1:] for name in "qkv"), scaling="log_key_count", gain=gain)
        torch.testing.assert_close(batch["out"][1:].double(), wanted, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_norms_of_keys_follow_the_cache():
    """They are copied with a block, as vLLM copies one that a request shares in part, and belong to one cache only."""
    layer, table = Layer({"scaling": "key_norm_mean"}, "float32"), torch.zeros(1, WIDTH, dtype=torch.int32)
    layer.renew_cache(5)
    table[0, :2] = torch.tensor([1, 2])
    (prompt,) = layer.run([([28], [28], table)])
    copy_kv_cache_blocks_inplace([layer.cache], 5, [(2, 4)])
    layer.run([([4], [32], table)], seed=1)  # the first request goes on in the first block
    table[0, 1] = 4
    batch = layer.batch([9], [30], table)  # the second repeats some keys, and goes on in the copy
    for name, x in zip("kv", prompt[2:], strict=True):
        batch[name][:7] = x[21:]
    out = layer.parts(**batch)[1]()
    keys, values = (torch.cat([x[:21], batch[name]]) for name, x in zip("kv", prompt[2:], strict=True))
    wanted = exact(batch["q"], keys, values, scaling="key_norm_mean")
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=TOLERANCE)
    layer.renew_cache(PAGES)
    assert max(x.error(scaling="key_norm_mean") for x in layer.run(STEPS)) < TOLERANCE


@pytest.mark.parametrize("switch", ["settings", "environment"])
@pytest.mark.parametrize("mode", ["sqrt_dim", "key_norm_mean"])
@torch.no_grad()
def test_bits_do_not_depend_on_the_batch(mode, switch, monkeypatch):
    if switch == "environment":
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    layer = Layer({"scaling": mode, **({"batch_invariant": True} if switch == "settings" else {})}, "float32")
    batch = layer.batch([90, 60], [90, 60])
    together = layer.parts(**batch)[1]().clone()[:90]
    layer.renew_cache(PAGES)
    for start, end in itertools.pairwise([0, 1, 30, 31, 89, 90]):
        part = layer.batch([end - start], [end])
        for name in "qkv":
            part[name].copy_(batch[name][start:end])
        assert torch.equal(layer.parts(**part)[1](), together[start:end])
