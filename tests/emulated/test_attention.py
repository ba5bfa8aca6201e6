"""Forward and backward kernels of sm_80 and sm_90: every dtype, head dim, mask, scale and form."""

from __future__ import annotations

import pytest
import torch

import tritonattn
from tests.support.pairs import in_turn
from tritonattn.backends.triton import attention as kernels
from tritonattn.backends.triton import grids
from tritonattn.calls import key_statistics
from tritonattn.tuning import TileConfig

from .cases import Case
from .executor import GPU, padded_operands
from .recorder import Recorder

HALF, BFLOAT, SINGLE = torch.float16, torch.bfloat16, torch.float32
SMALL = TileConfig(16, 16, 1, 2)  # short sequences have inner blocks, edges and tails
WARPGROUP = TileConfig(64, 16, 4, 2)  # the smallest that wgmma takes
QUERY, BOTH, BIAS = ("query_scale",), ("query_scale", "key_scale"), ("query_scale", "key_bias")
ALL, PAIRS = (*BOTH, "key_bias"), ("query_scale", "bias", "relative_bias", "relative_scale")

# Small tiles, whose sequences have many blocks; the slow test has default ones.
FAST = (GPU(90, True), Case(BFLOAT, (24, 40), WARPGROUP, "causal window", ALL, "sinks", (2, 2), (70, 90), 1))
OTHERS = (
    (GPU(80), Case(HALF, tiles=SMALL, mask="everything", scales=BIAS, form="everything", heads=(2, 1))),
    (GPU(80), Case(BFLOAT, tiles=SMALL, mask="everything", scales=(*PAIRS, "key_bias"), form="aux", heads=(2, 1))),
)

# Loops of the default configs with masks, forms and lengths in turn, of which tests/kernels has all pairs. Head dims
# beyond 128 share their tiles, fp32 has the same on each GPU, and tests/emulated/test_varlen.py has the rest.
EVERYTHING = [
    (GPU(80), Case(HALF, (128, 128), None, "everything", (), "sinks", (1, 2), (130, 200))),
    (GPU(80), Case(BFLOAT, (72, 136), None, "full", ALL, "sinks", (2, 1), (70, 17))),
    (GPU(80), Case(BFLOAT, (512, 384), None, "causal", QUERY, "plain", (1, 1), (20, 40), 1)),
    (GPU(90), Case(BFLOAT, (128, 128), None, "wide causal window", PAIRS, "sinks", (2, 1), (2, 70))),
    (GPU(90), Case(HALF, (256, 256), None, "everything", PAIRS, "everything", (1, 2), (200, 130))),
    (GPU(90), Case(SINGLE, (256, 256), None, "mask of heads", PAIRS, "dropout", (2, 1), (2, 70))),
    (GPU(90, True), Case(HALF, (128, 128), None, "full", QUERY, "everything", (2, 1), (130, 200))),
    (GPU(90, True), Case(BFLOAT, (72, 136), None, "wide causal window", ALL, "everything", (1, 2), (130, 200))),
]


@pytest.mark.parametrize(
    ("gpu", "case"), [FAST, *(pytest.param(*one, marks=pytest.mark.slow) for one in OTHERS)], ids=str
)
def test_attention(gpu, case, emulate):
    executor = emulate(gpu, case.tiles)
    case.check()
    of_ranges, of_keys = (executor.launched.count(name) for name in ("row_bounds_kernel", "keys_seen"))
    assert of_ranges == (case.mask in ("ranges", "causal ranges", "everything"))
    assert of_keys == 2 * (case.mask in ("ranges", "causal ranges"))
    assert len(executor.launched) == 4 + of_ranges + of_keys  # forward, row terms, both backward kernels


@pytest.mark.slow
def test_parts_of_splits_are_joined(emulate, monkeypatch):
    """Scales of either sign, whose rows go through the memory of parts; a dead split, and one that begins in a head."""
    for name in ("splits_of_keys", "splits_of_rows"):
        monkeypatch.setattr(grids, name, lambda *sizes: 3)
    monkeypatch.setattr(kernels, "_kept", kernels._kept.__wrapped__)
    executor = emulate(GPU(80), SMALL)
    Case(HALF, tiles=SMALL, mask="causal", scales=BIAS, form="sinks", batch=1).check()
    assert (executor.launched.count("combine_splits"), executor.launched.count("sum_of_splits")) == (1, 3)


@in_turn(name=["q", "k", "gain"], softcap=[None, None, 2.0])
def test_nan_of_a_visible_pair_is_in_its_row(name, softcap, emulate):
    """A GPU's maximum passes over NaN: it must not leave a row of NaN, and its statistics, as those without keys."""
    emulate(GPU(80), SMALL)
    q, k, v = torch.randn(3, 1, 1, 24, 16, dtype=BFLOAT).unbind(0)
    operands = {"q": q, "k": k, "v": v, "gain": torch.ones(1, 1, 24)}
    row = 0 if name == "k" else 20
    operands[name][:, :, row] = torch.nan
    operands |= padded_operands({key: operands[key] for key in "qkv"})
    out, aux = tritonattn.attention(
        **operands, scaling="key_count", causal=True, softcap=softcap, return_aux=True, backend="triton"
    )
    nan = torch.arange(24) >= 0 if name == "k" else torch.arange(24) == row
    assert torch.equal(out.isnan(), nan[:, None].expand_as(out))
    for statistic in aux:
        assert torch.equal(statistic.isnan(), nan.expand_as(statistic))


@pytest.mark.slow
def test_bits_of_batch_invariant_rows(emulate, monkeypatch):
    """Causal rows among all rows, told their keys by ranges, and in decoding; tests/invariance has more batches.

    `cosine` divides by the queries' norms, whose last bit shows in lse behind a softcap. The compiler may fuse nothing:
    it would do so in one code and not in another.
    """
    recorder = emulate(GPU(80), SMALL, executor=Recorder)
    torch.manual_seed(0)
    monkeypatch.setattr(key_statistics, "launches", lambda *keys: True)  # not only of tensors on a GPU
    q, k, v = torch.randn(3, 1, 2, 48, 40, dtype=torch.float16)  # padded, where loads before a product change its order
    rows = torch.arange(39, 48)
    ranges = torch.stack([torch.zeros_like(rows), rows + 1], dim=-1)[None]
    options = {"softcap": 1.5, "return_aux": True, "backend": "triton", "batch_invariant": True, "scaling": "cosine"}
    out, aux = tritonattn.attention(q, k, v, causal=True, **options)
    by_ranges = tritonattn.attention(q[:, :, 39:], k, v, key_ranges=ranges, **options)
    statistics = tritonattn.KeyStatistics(1, 2, 48)
    statistics.append(k)
    options |= {"key_lengths": torch.tensor([48]), "statistics": statistics}
    decoded = tritonattn.attention_decode(q[:, :, 39:], k, v, **options)
    for few, few_aux in (by_ranges, decoded):
        for whole, part in zip((out, *aux), (few, *few_aux), strict=True):
            assert torch.equal(whole[:, :, 39:], part)
    fused = {one.name for one in recorder.launches if one.launched.kernel.metadata.enable_fp_fusion}
    assert fused == {"keys_seen"}, "whole numbers alone"
