"""The path through PyTorch's attention: its results, gradients where its kernel is least exact, and its memory."""

import itertools

import pytest
import torch

import tritonattn
from tests.kernels import harness
from tests.support.bound import BAND, PYTORCH_GRADIENT_BAND, assert_within_bound
from tests.support.masks import MASKS
from tests.support.pairs import in_turn, pairwise
from tests.support.watch import Watch
from tritonattn.backends.cpu import torch_kernel

from .test_cpu import BOTH, CPU, direction, run

FAST = "aten::_scaled_dot_product_flash_attention_for_cpu"
WIDE = {"kv_heads": 16, "group": 1, "head_dim": 64, "value_dim": 64}


def inputs(dtype, length, k_len=None, **options):
    lengths = {"q_len": length, "k_len": length if k_len is None else k_len}
    return harness.inputs(dtype, CPU, **{"kv_heads": 2, "value_dim": 8, **lengths, **options})


@pytest.fixture(autouse=True)
def verdicts(monkeypatch):
    """The answers of `supports` to the calls so far."""
    found, supports = [], torch_kernel.supports
    monkeypatch.setattr(torch_kernel, "supports", lambda *call: found.append(supports(*call)) or found[-1])
    return found


@pytest.fixture
def check(verdicts):
    """Results and gradients within the bound, in every head by itself where asked."""

    def check(tensors, each_head=False, **arguments):
        attend, dtype = tritonattn.scaled_attention, tensors["q"].dtype
        results = harness.ours_exact_eager(tensors, attend, backend="sdpa", **arguments)
        assert all(verdicts)
        for name, result in results[0].items():
            band = BAND if name == "out" else PYTORCH_GRADIENT_BAND
            of_parts = [[x[name]] for x in results]
            if each_head:
                of_parts = [x[name].unbind(1) for x in results]
            for values in zip(*of_parts, strict=True):
                assert_within_bound(*values, dtype, name=name, band=band)
            assert result.dtype == results[2][name].dtype

    return check


@pairwise(
    length=[17, 130, 530],
    kv_heads=[1, 2, 4],
    dtype=[torch.float64, torch.float32, torch.float16, torch.bfloat16],
    scales=[(), BOTH],
    causal=[False, True],
)
def test_is_the_reference(length, kv_heads, dtype, scales, causal, check):
    scale = 0.25
    if scales:  # in fp32 sharper rows are under the README's Limits
        scale = 0.05 if dtype == torch.float32 else 0.1
    tensors = inputs(dtype, length, kv_heads=kv_heads, group=4 // kv_heads, scales=scales)
    check(tensors, scale=scale, causal=causal)


@pytest.mark.parametrize("q_len", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_lone_key(q_len, dtype):
    tensors = inputs(dtype, q_len, 1, scales=BOTH)
    d_out = direction(tensors)
    results = run(tensors, d_out)
    assert torch.equal(results.pop("out"), tensors["v"].repeat_interleave(2, 1).expand(-1, -1, q_len, -1))
    wanted = d_out.double().unflatten(1, (2, 2)).sum((2, 3))
    error = (results.pop("v")[:, :, 0].double() - wanted).abs().max()
    assert error <= 2 * torch.finfo(dtype).eps * wanted.abs().max()
    assert all(gradient.count_nonzero() == 0 for gradient in results.values())


@in_turn(
    head_dims=[(1, 1), (3, 16), (16, 3), (37, 37), (96, 64), (64, 128), (200, 256), (256, 1)],
    dtype=[torch.float32, torch.float16, torch.bfloat16],
)
def test_head_dims(head_dims, dtype, check):
    check(inputs(dtype, 70, head_dim=head_dims[0], value_dim=head_dims[1]), causal=True)


@pytest.mark.parametrize("scale", [0.0, -0.7])
@pytest.mark.parametrize("causal", [False, True])
def test_zero_and_negative_constants(scale, causal, check):
    check(inputs(torch.float32, 45, scales=BOTH), scale=scale, causal=causal)


def test_tiny_scales_keep_their_digits_in_fp16():
    tensors = inputs(torch.float16, 64, scales=("query_scale",))
    tensors["query_scale"] *= 1e-5
    attend, options = tritonattn.scaled_attention, {"scale": 1.0, "causal": True}
    found, exact, _ = (x["query_scale"] for x in harness.ours_exact_eager(tensors, attend, backend="sdpa", **options))
    assert (found.double() - exact).abs().max() <= 2e-3 * exact.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "length", "scale", "sizes"),
    [
        (torch.float16, 64, 0.1, {"k": 1e-6, "query_scale": 1e5}),  # q * query_scale would be infinite
        (torch.bfloat16, 300, 0.3, {"q": 4, "k": 4, "query_scale": 1}),
        (torch.bfloat16, 300, 0.3, {"q": 4, "k": 4, "key_scale": 1}),
    ],
    ids=str,
)
def test_scaled_operands_neither_overflow_nor_are_rounded(dtype, length, scale, sizes):
    """Large scales of small keys in fp16, and large logits in bf16."""
    tensors = inputs(dtype, length, scales=tuple(name for name in BOTH if name in sizes))
    tensors |= {name: tensors[name] * size for name, size in sizes.items()}
    runs = ((tensors, "sdpa"), (harness.as_double(tensors), "reference"), (tensors, "reference"))
    options = {"scale": scale, "causal": True}
    results = (tritonattn.scaled_attention(**given, backend=backend, **options) for given, backend in runs)
    assert_within_bound(*results, dtype)


CAUSAL = {"causal": True}
HIDDEN_BY_SHAPES = [((9, 12), CAUSAL), ((12, 9), CAUSAL), ((9, 9), {**CAUSAL, "window": (8, None)})]
HIDDEN_BY_SHAPES += [((1, 12), {"window": (10, 0)}), ((9, 12), {"window": (11, 7)}), ((9, 9), {"window": (0, 8)})]


def test_supports_nothing_else(verdicts):
    """Neither rows of some keys alone, nor masks of values, nor extras."""
    others = [((37, 37), mask(2, 4, 37, 37)) for name, mask in MASKS.items() if name not in ("full", "causal")]
    others += [*HIDDEN_BY_SHAPES, *(((37, 37), one) for one in ({"softcap": 2.0}, {"dropout_p": 0.1}))]
    others += [((37, 37), {"sinks": torch.zeros(4)}), ((37, 37), {"return_aux": True})]
    for lengths, options in others:
        tritonattn.scaled_attention(**inputs(torch.float32, *lengths), backend="sdpa", **options)
    assert verdicts == [False] * len(others)


@pairwise(length=[1, 2, 15, 16, 17], causal=[False, True], dtype=[torch.float32, torch.bfloat16, torch.float64])
def test_nan_in_a_visible_key_is_in_results(length, causal, dtype):
    """With fewer than 16 keys PyTorch's kernel returns 0 or stale memory."""
    visible = torch.ones(length, length, dtype=torch.bool).tril(0 if causal else length)
    for name, position, learns in itertools.product(("q", "k", "gain"), {0, length // 2, length - 1}, (False, True)):
        q, k, v = torch.randn(3, 1, 2, length, 8).to(dtype).unbind(0)
        operands = {"q": q.clone(), "k": k.clone(), "v": v.clone()}
        operands["gain"] = torch.ones(1, 2, length, dtype=torch.promote_types(dtype, torch.float32))
        operands[name][:, :, position] = torch.nan
        leaves = {key: x.requires_grad_(learns) for key, x in operands.items()}
        out = tritonattn.attention(**leaves, scaling="key_count", causal=causal)
        touched = visible[:, position] if name == "k" else torch.arange(length) == position
        assert torch.equal(out.isnan(), touched[:, None].expand_as(out)), (name, position, learns)
        aux = tritonattn.attention(**leaves, scaling="key_count", causal=causal, return_aux=True)[1]
        assert all(torch.equal(x.isnan(), touched.expand_as(x)) for x in aux), (name, position, learns)


LAYOUTS = {
    "contiguous": lambda x: x,
    "last axis strided": lambda x: torch.stack([x, x], -1)[..., 1],
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "lengths inside": lambda x: x.mT.contiguous().mT,
    "heads last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "expanded": lambda x: x[..., :1].expand(x.shape),
    "a part": lambda x: torch.cat([x, x], -1)[..., x.shape[-1] // 2 :][..., : x.shape[-1]],
}


@pairwise(
    layout=LAYOUTS,
    kv_heads=[1, 4],
    head_dims=[(16, 16), (1, 1), (16, 8), (8, 16)],
    dtype=[torch.float32, torch.bfloat16, torch.float64],
)
def test_never_leaves_the_fast_kernel(layout, kv_heads, head_dims, dtype):
    sizes = {"kv_heads": kv_heads, "group": 4 // kv_heads, "head_dim": head_dims[0], "value_dim": head_dims[1]}
    tensors = inputs(dtype, 512, scales=BOTH, **sizes)
    tensors |= {name: LAYOUTS[layout](tensors[name]) for name in "qkv"}
    with Watch() as watch:
        run(tensors, direction(tensors), causal=True)
    assert watch.calls[FAST] == watch.calls[FAST + "_backward"] == 1
    assert watch.largest <= 2 * 8 * 2 * 4 * 512 * 16  # twice q in fp64: a sixteenth of the 512 * 512 pairs


@pairwise(scaled=[False, True], length=[2, 40], dtype=[torch.float32, torch.bfloat16])
def test_a_row_of_one_key_leaves_no_rounding_in_gradients(scaled, length, dtype, check):
    """Its logit has the gradient 0; with two tokens a rounding of it can exceed all other gradients of the key."""
    tensors = inputs(dtype, length, **WIDE)
    if scaled:
        tensors["query_scale"] = (torch.arange(length, 0, -1.0) / length).repeat(2, 16, 1)
    check(tensors, causal=True)
    d_out, first = direction(tensors), torch.arange(length)[:, None] == 0
    found = run(tensors, d_out, causal=True)
    without = run(tensors | {"q": tensors["q"].masked_fill(first, 0)}, d_out, causal=True)
    assert all(found[name][:, :, 0].count_nonzero() == 0 for name in found.keys() & {"q", "query_scale"})
    assert torch.equal(found["out"][:, :, 0], tensors["v"][:, :, 0])
    assert found["k"].count_nonzero() > 0
    assert torch.equal(found["k"], without["k"])


@in_turn(
    dtype=[torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16],
    means=[(10, 0), (10, 0), (10, 10), (100, 100)],
    scale=[0.125, 0.125, 1 / 256, 0.125, 0.125, 1 / 256, 0.125, 0.125],
    masks=[{"causal": True}, {}, {}, {"causal": True}, {}, {}, {}, {}],
)
def test_keys_and_values_with_means(dtype, scale, masks, means, check):
    """The error of delta, taken from a rounded output, reaches d_q and d_k times the mean key: each head by itself."""
    tensors = inputs(dtype, 256, head_dim=64, value_dim=64)
    tensors |= {"k": tensors["k"] + means[0], "v": tensors["v"] + means[1]}
    check(tensors, each_head=True, scale=scale, **masks)


def test_gradients_summed_over_many_rows(check):
    """By PyTorch's kernel, in 16 bits, they are 1.5 times the bound off."""
    check(inputs(torch.float16, 550, batch=1, kv_heads=1, value_dim=16), scale=0.25, causal=True)


@pytest.mark.parametrize("scaling", ["sqrt_dim", "cosine", "key_norm_mean"])
@pytest.mark.parametrize(
    ("dtype", "kv_heads", "lengths", "is_plain"),
    [
        (torch.float32, 4, [20, 20], True),
        (torch.float32, 2, [3, 3], True),
        (torch.float32, 4, [20, 9], False),
        (torch.bfloat16, 2, [20, 20], True),
        (torch.bfloat16, 4, [20, 20], False),
        (torch.float16, 2, [20, 20], False),
    ],
    ids=str,
)
def test_a_step_over_caches_of_one_length_is_a_plain_call(dtype, kv_heads, lengths, is_plain, scaling, verdicts):
    """But for lone 16-bit rows. NaN behind the last key of a cache reaches nothing."""
    tensors = harness.inputs(dtype, CPU, kv_heads=kv_heads, group=4 // kv_heads, q_len=1, k_len=33, value_dim=24)
    q, k, v = (tensors[name] for name in "qkv")
    found, wanted = [], []
    for out, x, backend in ((found, dtype, "sdpa"), (wanted, torch.float64, "reference")):
        caches = (one.to(x).index_fill(2, torch.arange(max(lengths), 33), torch.nan) for one in (k, v))
        options = {"key_lengths": torch.tensor(lengths), "scaling": scaling, "backend": backend}
        out.append(tritonattn.attention_decode(q.to(x), *caches, **options))
    assert verdicts[-1] is is_plain
    assert found[0].dtype == dtype
    torch.testing.assert_close(
        found[0].double(), wanted[0], rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps
    )
