"""The values of the modes, by hand and against the code of models that have them."""

import dataclasses
import math
import types

import pytest
import torch

from tritonattn import attention
from tritonattn.core.statistics import SMALLEST_STATISTIC, Statistics, counts_of, reciprocal, reciprocal_root
from tritonattn.core.visibility import Visibility
from tritonattn.nn import LearnedCosine, SSMax
from tritonattn.scaling import (
    SCALINGS,
    Beam,
    Cosine,
    Grok2,
    Inkling,
    Inkling2,
    KeyNormMax,
    Llama4,
    LogKeyCount,
    Ministral3,
    QwenLogn,
    Scales,
)


def scales_of(scaling, q, k=None, **masks) -> Scales:
    k = q if k is None else k
    visibility = Visibility.of(q, k, **masks)
    return scaling.scales(q, k, visibility, Statistics(k, visibility))


@pytest.mark.parametrize(("mode", "factor"), [("sqrt_dim", 0.25), ("dim", 0.0625), ("none", 1.0)])
def test_constants(mode, factor):
    q = torch.randn(1, 1, 3, 16)
    scales = scales_of(SCALINGS[mode](), q)
    assert (scales.constant, scales.query, scales.key) == (factor, None, None)
    assert SCALINGS[mode]().multiplier(q, q, torch.ones(3, 3).bool()).item() == factor


# ---- Numbers of keys


def factors(scaling, rows=5, dim=16):
    """The factor of every row of a causal square."""
    scales = scales_of(scaling, torch.randn(1, 1, rows, dim), causal=True)
    return (scales.constant * scales.query).flatten().tolist()


def test_counts():
    assert factors(SCALINGS["key_count"]()) == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    assert factors(SCALINGS["sqrt_key_count"]()) == pytest.approx([n**-0.5 for n in range(1, 6)])
    assert LogKeyCount(512.0) == LogKeyCount(512.0) != LogKeyCount()
    assert factors(LogKeyCount()) == pytest.approx([math.log(n) / 4 for n in range(1, 6)])
    assert factors(LogKeyCount(base=5.0))[4] == pytest.approx(1 / 4), "as sqrt_dim at the base"


TEMPERATURES = ("grok2", "llama4", "ministral3", "inkling", "beam")


@pytest.mark.parametrize("name", ["key_count", "sqrt_key_count", "log_key_count", "qwen_logn", *TEMPERATURES])
@pytest.mark.parametrize("keys", [0, 1, 7, 20000])
def test_where_all_rows_attend_to_all_keys_the_factor_is_a_number(name, keys):
    """The number is the factor of a causal mask's last row."""
    q, k = torch.empty(1, 1, 1, 4), torch.empty(1, 1, keys, 4)
    alone = scales_of(SCALINGS[name](), q, k)
    assert alone.query is None
    of_rows = scales_of(SCALINGS[name](), q, k, key_lengths=torch.tensor([keys]))
    assert alone.constant == pytest.approx((of_rows.constant * of_rows.query).item(), rel=1e-12)


def kept(k_len=7, inference=False, device="cpu", **mask):
    """`counts_of` 5 rows."""
    visibility = Visibility.of(torch.empty(2, 3, 5, 16), torch.empty(2, 3, k_len, 16), **mask)
    with torch.inference_mode(inference):
        return counts_of(dataclasses.replace(visibility, device=torch.device(device)))


def test_counts_on_a_gpu_belong_to_a_stream_and_to_no_captured_graph(monkeypatch):
    stream, captured = [0], [False]
    monkeypatch.setattr(Visibility, "counts", lambda self: torch.ones(1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured[0])
    first = kept(causal=True, device="cuda:0")
    captured[0] = True
    assert len({kept(causal=True, device="cuda:0") for _ in range(3)} | {first}) == 4
    captured[0] = False
    assert kept(causal=True, device="cuda:0") is first
    stream[0] = 1
    assert kept(causal=True, device="cuda:0") is not first


@pytest.mark.parametrize("inference", [False, True])
def test_counts_that_a_scaling_wrote_to_are_made_again(inference):
    with torch.inference_mode(inference):
        kept(causal=True, inference=inference).zero_()
    for later in (inference, not inference):
        assert kept(causal=True, inference=later).flatten().tolist() == [3, 4, 5, 6, 7]
    assert kept(causal=True) is kept(causal=True, inference=True)


# ---- Presets


def modeling(model):
    return pytest.importorskip(f"transformers.models.{model}.modeling_{model}")


# Each of positions from 0; written out where transformers has no function: of Qwen, Grok 2 and Llama 4.
POSITIONS = torch.arange(5000)
TEMPERATURES = {
    "qwen": (QwenLogn(64), lambda: [math.log(i, 64) if i > 64 else 1 for i in range(1, 5001)]),
    "grok2": (Grok2(64), lambda: [math.log2(i) / math.log2(64) if i > 64 else 1 for i in range(5000)]),
    "llama4": (Llama4(0.3, 16), lambda: torch.log1p(torch.floor((POSITIONS.double() + 1.0) / 16)) * 0.3 + 1.0),
    "ministral3": (
        Ministral3(0.2, 16),
        lambda: modeling("ministral3").get_llama_4_attn_scale(POSITIONS[None], 0.2, 16).flatten(),
    ),
    "beam": (Beam(), lambda: modeling("beam").compute_attention_scaling(POSITIONS[None]).flatten()),
}


@pytest.mark.parametrize("name", TEMPERATURES)
def test_temperatures_are_those_of_their_models(name):
    scaling, model = TEMPERATURES[name]
    wanted = torch.as_tensor(model(), dtype=torch.float64) / 4
    assert factors(scaling, len(POSITIONS)) == pytest.approx(wanted.tolist(), rel=1e-6)


def log_scale(rows):
    """The temperature of `Inkling` with alpha 0.3 and n_floor 16, by the code of Inkling 2."""
    config = types.SimpleNamespace(log_scaling_alpha=0.3, log_scaling_n_floor=16)
    return modeling("inkling2").Inkling2LogScale(config)(torch.ones(1, rows, 1, 1), torch.arange(rows)[None])


def test_inkling_is_its_models_function(monkeypatch):
    """A layer without a window, its position bias at 0: with the temperature, and q, k, v of the layer without it."""
    inkling, eager, calls = modeling("inkling"), modeling("inkling").eager_attention_forward, []
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    config = inkling.InklingTextConfig(**sizes, layer_types=["hybrid"], log_scaling_alpha=0.3)
    config._attn_implementation = "eager"
    layer = inkling.InklingAttention(config, 0).requires_grad_(False)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    torch.nn.init.zeros_(layer.rel_logits_proj.proj)

    def noted(module, *tensors, **arguments):
        calls.append((*tensors[:3], eager(module, *tensors, **arguments)[0]))
        return calls[-1][-1], None

    monkeypatch.setattr(inkling, "eager_attention_forward", noted)
    x, mask = torch.randn(1, 40, 16), torch.full((40, 40), -torch.inf).triu(1)[None, None]
    layer(x, mask)
    config.log_scaling_n_floor = 16
    layer(x, mask)
    (q, k, v, plain), (_, _, _, wanted) = calls
    assert (wanted - plain).abs().max() > 1e-2
    ours = attention(q, k, v, scaling=Inkling(0.3, 16), gain=8**-0.5, causal=True).transpose(1, 2)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def test_inkling2_clips_as_its_model():
    q, k, v = (torch.randn(1, 2, 40, 16) * torch.logspace(-1, 1, 40)[:, None] for _ in range(3))
    clip = modeling("inkling2").Inkling2L2Clip(3.0)
    clipped, keys = clip(q) * log_scale(40)[..., 0], clip(k)
    assert (clipped != q).any()
    assert (keys == k).any()
    wanted = torch.nn.functional.scaled_dot_product_attention(clipped, keys, v, is_causal=True)
    for backend in ("sdpa", "reference"):
        ours = attention(q, k, v, scaling=Inkling2(0.3, 16, 3.0), causal=True, backend=backend)
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_mistral_large4_is_ssmax_with_a_bias():
    model, (q, k, v) = modeling("mistral_large4").MistralLarge4TextSoftmaxScaling(4), torch.randn(3, 1, 4, 30, 16)
    with torch.no_grad():
        model.scale.normal_()
        model.bias.normal_()
    scaling = SSMax(heads=4, bias=True)
    scaling.load_state_dict({"s": model.scale, "b": model.bias})
    scaled = model(q, torch.arange(30)[None], head_dim_first=True)
    wanted = torch.nn.functional.scaled_dot_product_attention(scaled, k, v, is_causal=True)
    torch.testing.assert_close(attention(q, k, v, scaling=scaling, causal=True), wanted, rtol=1e-4, atol=1e-5)


def test_bad_parameters_are_refused():
    above_1 = [(LogKeyCount, "base", value) for value in (1.0, 0.5, math.inf, math.nan, "e", None, True)]
    above_1 += [(QwenLogn, "train_length", 1), (QwenLogn, "train_length", math.nan)]
    above_0 = [(Cosine, "tau", value) for value in (0, -1.0, math.nan, math.inf, "1")]
    above_0 += [(Llama4, "scale", 0.0), (Llama4, "floor_scale", None), (Llama4, "floor_scale", -8192)]
    above_0 += [(Inkling, "alpha", 0.0), (Inkling2, "n_floor", -1), (Inkling2, "threshold", math.nan)]
    above_0 += [(Beam, "power", 0), (Beam, "length", math.inf)]
    above_0 += [(Ministral3, "beta", math.inf), (Ministral3, "original_length", "16384")]
    for least, refused in enumerate((above_0, above_1)):
        for mode, argument, value in refused:
            with pytest.raises(
                ValueError, match=rf"^{argument}: expected a finite number above {least}, got {value!r}"
            ):
                mode(**{argument: value})


# ---- Norms of keys


STATISTICS = {  # of the keys so far
    "key_norm_sum": [5, 7, 17],
    "key_norm_mean": [5, 3.5, 17 / 3],
    "key_norm_rms": [5, math.sqrt(29 / 2), math.sqrt(129 / 3)],
    "key_norm_max": [5, 5, 10],
    "key_norm_l2": [5, math.sqrt(29), math.sqrt(129)],
}
KEYS = torch.tensor([[3.0, 4.0], [0.0, 2.0], [-6.0, 8.0]], dtype=torch.float64)[None, None]  # norms 5, 2, 10


def query_scale(scaling, k, **arguments):
    scales = scales_of(scaling, k, **arguments)
    assert (scales.constant, scales.key) == (1.0, None)
    return scales.query[0, 0]


@pytest.mark.parametrize("mode", STATISTICS)
def test_key_norms(mode):
    row = query_scale(SCALINGS[mode](), KEYS, causal=True)
    assert row.tolist() == pytest.approx([1 / statistic for statistic in STATISTICS[mode]], rel=1e-14)


def test_the_lowest_of_equal_keys_takes_the_gradient():
    k = torch.ones(1, 1, 4, 2, dtype=torch.float64, requires_grad=True)
    visible = torch.tensor([False, True, True, True]).expand(1, 1, 4, 4)
    ours = query_scale(KeyNormMax(), k, mask=visible).sum()
    ranged = query_scale(KeyNormMax(), k, key_ranges=torch.tensor([[[1, 4]] * 4])).sum()
    dense = KeyNormMax().multiplier(k, k, visible).sum()
    for factor in (ours, ranged, dense):
        (gradient,) = torch.autograd.grad(factor, k)
        assert gradient[0, 0].any(-1).tolist() == [False, True, False, False]


def test_statistics_below_the_normal_range_count_as_zero():
    k = torch.full((1, 1, 3, 2), 1e-40, requires_grad=True)
    for mode in STATISTICS:
        row = query_scale(SCALINGS[mode](), k)
        assert (row == 0).all()
        assert (torch.autograd.grad(row.sum(), k)[0] == 0).all()


def test_a_nan_that_a_row_attends_to_is_not_hidden():
    k = KEYS.clone()
    k[0, 0, 1, 0] = torch.nan
    for mode in STATISTICS:
        assert query_scale(SCALINGS[mode](), k, causal=True).isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest_statistic_that_counts(dtype):
    """In fp32, where autograd has a node for it, as in fp64; a root counts where its square is the smallest's."""
    limit = torch.tensor(SMALLEST_STATISTIC, dtype=dtype)
    below = limit.nextafter(torch.zeros_like(limit))
    s = torch.stack([limit, below, torch.zeros_like(limit), limit * 0 + torch.nan]).requires_grad_()
    factor = reciprocal(s)
    assert factor[:3].tolist() == [2.0**126, 0, 0]
    assert factor[3].isnan()
    assert torch.autograd.grad(factor[:3].sum() * 2.0**-130, s)[0][:3].tolist() == [-(2.0**122), 0, 0]
    square = s.detach().double().square()
    assert reciprocal_root(square)[:3].tolist() == [2.0**126, 0, 0]


# ---- Cosines


def vectors():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(1, 2, 5, 16, dtype=torch.float64, generator=generator) for _ in range(2))


@pytest.mark.parametrize("tau", [None, 10.0])
def test_logits_are_cosines(tau):
    q, k = vectors()
    scales = scales_of(Cosine(tau), q, k)
    logits = scales.constant * (q @ k.mT) * scales.query[..., None] * scales.key[:, :, None]
    cosine = torch.nn.functional.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1)
    torch.testing.assert_close(logits, cosine * (tau or 4.0))


def test_norms_whose_product_is_below_fp32():
    """Their factor is above it, and the products of q and k are 0 unless scales are folded into q and k."""
    q, k = (x.float() * size for x, size in zip(vectors(), (1e-20, 1e-25), strict=True))
    for backend in ("sdpa", "reference"):
        assert attention(q, k, torch.ones_like(k), scaling="cosine", backend=backend).isfinite().all()


@pytest.mark.parametrize("mode", [Cosine(), LearnedCosine(2)], ids=type)
def test_a_cosine_of_one_dimension_trains_nothing_and_says_so(mode):
    q, k, v = (torch.randn(1, 2, 5, 1, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = attention(q, k, v, scaling=mode)
    for gradient in torch.autograd.grad(out.square().sum(), (q, k)):
        torch.testing.assert_close(gradient, torch.zeros_like(q), atol=1e-12, rtol=0)
    assert "At D = 1 every cosine is 1 or -1" in type(mode).__doc__
