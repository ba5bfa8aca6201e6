"""PyTorch's kernel on parts of the visible pairs: results and gradients."""

import math

import pytest
import torch

import tritonattn
from tests.kernels import harness
from tests.support.bound import BAND, PYTORCH_GRADIENT_BAND, assert_within_bound
from tests.support.masks import MASKS
from tests.support.pairs import pairwise
from tritonattn.backends.cpu import by_parts, parts
from tritonattn.core import autograd

from .test_cpu import BOTH, CPU, DTYPES, SIZES, assert_hidden_values_reach_nothing, direction, of_form, run

BIASES = {
    "none": {},
    "of keys": {"key_bias": (2, 4, 29)},
    "of keys with -inf": {"key_bias": (2, 4, 29)},
    "of pairs": {"bias": (2, 1, 21, 29)},
    "of distances": {"relative_bias": (1, 4, 1, 30)},
    "all": {"key_bias": (2, 4, 29), "bias": (1, 4, 21, 1), "relative_bias": (1, 1, 21, 30)},
}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "_ROWS", 8)
    monkeypatch.setattr(parts, "_LEAST_ROWS", 4)
    monkeypatch.setattr(parts, "_PAIRS", 64)
    monkeypatch.setattr(parts, "_SHORTEST", 4)
    monkeypatch.setattr(parts, "_SPLIT", 4)
    monkeypatch.setattr(parts, "_CALL", 0)
    autograd.facts_of.cache_clear()
    yield
    autograd.facts_of.cache_clear()


@pytest.fixture
def taken(monkeypatch):
    """The answers of `prepared` so far, and True for each output that was sound without it."""
    answers, prepared, is_sound = [], by_parts.prepared, by_parts.is_sound
    monkeypatch.setattr(by_parts, "prepared", lambda *arguments: answers.append(prepared(*arguments)) or answers[-1])

    def judged(*arguments):
        if is_right := is_sound(*arguments):
            answers.append(True)
        return is_right

    monkeypatch.setattr(by_parts, "is_sound", judged)
    return answers


def check(tensors, gradients=True, **arguments):
    results = harness.ours_exact_eager(
        tensors, tritonattn.scaled_attention, backend="sdpa", gradients=gradients, **arguments
    )
    for name in results[0]:
        ours, exact, eager = (one[name] for one in results)
        hidden = exact.isneginf()
        assert torch.equal(ours.isneginf(), hidden), name
        values = (x.masked_fill(hidden, 0) for x in (ours, exact, eager))
        band = PYTORCH_GRADIENT_BAND if name in tensors else BAND
        assert_within_bound(*values, tensors["q"].dtype, name=name, band=band)


@pairwise(
    mask=MASKS,
    bias=BIASES,
    dtype=DTYPES,
    kv_heads=[1, 2, 4],
    scales=[(), BOTH],
    sinks=[False, True],
    scale=[0.3, -0.3, 0.0],
    gradients=[False, True],
)
def test_every_mask(mask, bias, dtype, kv_heads, scales, sinks, scale, gradients, taken):
    if mask == "full" and bias == "none" and not sinks:
        mask = "lengths"  # the full call is that of `torch_kernel.supports`
    tensors, arguments = of_form("plain", dtype, mask, kv_heads, (*scales, "sinks") if sinks else scales)
    random = torch.Generator().manual_seed(3)
    biases = {name: torch.randn(size, generator=random) for name, size in BIASES[bias].items()}
    if bias == "of keys with -inf":
        biases["key_bias"][:, ::2, 5:] = -torch.inf
    if "relative_bias" in biases:
        arguments["relative_right"] = 4
    arguments |= {"scale": scale, **biases}
    check(tensors, gradients, **arguments)
    assert taken
    assert taken[0] is not None


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biases", [{}, {"bias": (1, 4, 3, 130)}, {"key_bias": (2, 4, 130)}], ids=str)
def test_few_rows_of_a_group(kv_heads, dtype, biases):
    """In 16 bits an entry at a time, widened."""
    tensors = harness.inputs(dtype, CPU, kv_heads=kv_heads, group=4 // kv_heads, q_len=3, k_len=130)
    random = torch.Generator().manual_seed(3)
    biases = {name: torch.randn(size, generator=random).to(dtype) for name, size in biases.items()}
    for lengths in ([17, 130], [130, 130]):
        for gradients in (False, True):
            check(tensors, gradients, key_lengths=torch.tensor(lengths), **biases)


PREFIX = {"q_len": 24, "k_len": 60}


@pairwise(
    dtype=DTYPES,
    kv_heads=[1, 2, 4],
    scales=[(), BOTH],
    sinks=[False, True],
    gradients=[False, True],
    lengths=[(60, 60), (60, 45)],
)
def test_rows_behind_a_prefix_of_keys(dtype, kv_heads, scales, sinks, gradients, lengths, taken, monkeypatch):
    """A rectangle and a triangle, but for results of 16 bits, which are rounded before they could be joined."""
    forms, attend = [], by_parts._Operands.attend
    monkeypatch.setattr(by_parts._Operands, "attend", lambda self, one: forms.append(one.form) or attend(self, one))
    sizes = {"kv_heads": kv_heads, "group": 4 // kv_heads, **PREFIX}
    tensors = harness.inputs(dtype, CPU, scales=(*scales, "sinks") if sinks else scales, **sizes)
    check(tensors, gradients, causal=True, scale=0.3, key_lengths=torch.tensor(lengths))
    assert taken[-1] is not None
    is_exact = gradients or dtype.itemsize > 2
    assert (forms[:2] == ["full", "causal"]) == is_exact


def test_a_document_behind_one_with_a_prefix():
    """The triangle of the first and the square of the second are of one size and lie side by side."""
    starts = [torch.tensor(x, dtype=torch.int32) for x in ((0, 24, 48), (0, 60, 84))]
    random = torch.Generator().manual_seed(0)
    leaves = [torch.randn(n, 2, 8, generator=random, requires_grad=True) for n in (48, 84, 84)]
    found = []
    for backend in ("sdpa", "reference"):
        out = tritonattn.attention_varlen(*leaves, *starts, 24, 60, causal=True, backend=backend)
        found.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", [20, 50])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_behind_a_prefix_reaches_the_rows_that_attend_to_it(value, key):
    tensors = harness.inputs(torch.float32, CPU, kv_heads=2, **PREFIX)
    clean = run(tensors, direction(tensors), gradients=False, causal=True)["out"]
    tensors["k"][0, :, key] = value
    found = run(tensors, direction(tensors), gradients=False, causal=True)["out"]
    reached = (torch.arange(24) + 36 >= key) & (torch.arange(2) == 0)[:, None]
    torch.testing.assert_close(*(x.masked_fill(reached[:, None, :, None], 0) for x in (found, clean)))
    assert not found[0, :, -1].isfinite().all()


def test_a_row_of_one_key_gives_its_query_no_gradient(taken):
    """And its key none of that row, whatever biases there are."""
    tensors = harness.inputs(torch.float32, CPU, kv_heads=2, value_dim=72, scales=BOTH, **SIZES)
    row = torch.arange(21)
    arguments = {"scale": 0.3, "key_ranges": torch.stack([row - row % 3, row + 1], -1).expand(2, 21, 2)}
    arguments["key_bias"] = torch.randn(2, 4, 29, generator=torch.Generator().manual_seed(0))
    gradients = run(tensors, direction(tensors), **arguments)
    assert taken[-1] is not None
    for name in ("q", "query_scale"):
        assert gradients[name][:, :, ::3].count_nonzero() == 0
        assert gradients[name][:, :, 1::3].count_nonzero() > 0
    check(tensors, **arguments)


@pairwise(
    mask=["causal lengths", "causal ranges", "everything"],
    poison=[torch.nan, torch.inf, -torch.inf],
)
def test_keys_hidden_from_every_row_reach_nothing(mask, poison, taken):
    assert_hidden_values_reach_nothing(mask, poison, "plain")
    assert None not in taken


@pytest.mark.parametrize("operand", ["k", "v"])
def test_nan_of_one_operand_in_hidden_keys_reaches_nothing(operand, taken):
    tensors, _ = of_form("plain", torch.float32, scales=())
    mask = torch.rand(2, 4, 21, 29, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[..., 3::7] = False
    clean = run(tensors, direction(tensors), scale=0.3, mask=mask)
    tensors[operand][:, :, 3::7] = torch.nan
    harness.assert_same(run(tensors, direction(tensors), scale=0.3, mask=mask), clean)
    assert None not in taken


def test_nan_in_a_key_that_some_row_attends_to_reaches_its_rows_alone(taken):
    tensors, _ = of_form("plain", torch.float32)
    window = {"scale": 0.3, "causal": True, "window": (3, None)}
    clean = run(tensors, direction(tensors), gradients=False, **window)["out"]
    tensors["k"][:, :, 14] = torch.nan
    found = run(tensors, direction(tensors), gradients=False, **window)["out"]
    reached = found.isnan().all(-1)
    assert reached[..., 6:10].all()  # row i stands at key i + 8
    torch.testing.assert_close(found[~reached], clean[~reached])
    assert taken[-1] is None


def test_nan_among_few_keys_reaches_their_rows(taken):
    """The kernel's maximum skips it, and its lse is that of a row without keys."""
    tensors, _ = of_form("plain", torch.float32, scales=())
    tensors["k"][1, :, :3] = torch.nan
    found = run(tensors, direction(tensors), gradients=False, scale=0.3, key_lengths=torch.tensor([29, 3]))
    assert found["out"][1].isnan().all()
    assert found["out"][0].isfinite().all()
    assert taken[-1] is not True


@pytest.mark.parametrize("given", ["key_bias", "bias"])
def test_a_bias_that_hides_the_one_key_of_a_row_gives_no_gradient(given, taken):
    tensors, arguments = of_form("plain", torch.float32, scales=BOTH)
    row = torch.arange(21)
    arguments["key_ranges"] = torch.stack([row - row % 3, row + 1], -1).expand(2, 21, 2)
    arguments[given] = torch.zeros((1, 1, 29) if given == "key_bias" else (1, 1, 21, 29))
    arguments[given][..., ::6] = -torch.inf
    check(tensors, **arguments)
    assert taken[-1] is not None


@pytest.mark.parametrize("needs", ["q", "k"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scales_that_meet_no_pair_reach_no_gradient(needs, value, taken):
    """Where no part has a mask, and the scales themselves need no gradient: rows and keys of a shifted band."""
    tensors = harness.inputs(torch.float32, CPU, kv_heads=2, q_len=48, k_len=48, scales=BOTH)
    d_out, arguments = direction(tensors), {"scale": 0.3, "key_ranges": torch.tensor([0, 16]).repeat(2, 48, 1)}
    arguments["key_ranges"][:, 32:] = 0
    results = []
    for poison in (None, value):
        scales = {name: tensors[name].clone() for name in BOTH}
        if poison is not None:
            scales["query_scale"][:, :, 32:], scales["key_scale"][:, :, 16:] = poison, poison
        leaf = tensors[needs].clone().requires_grad_()
        operands = {name: tensors[name] for name in "qkv"} | {needs: leaf}
        out = tritonattn.scaled_attention(**operands, **scales, backend="sdpa", **arguments)
        results.append(torch.autograd.grad(out, leaf, d_out)[0])
    assert torch.equal(*results)
    assert None not in taken


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("keys", [3, 33, 48])
def test_nan_in_a_bias_reaches_the_rows_that_meet_it(value, keys, taken):
    """A kernel's lse of such a row is that of one without keys, or inf. Statistics, and their lse, are of tiles."""
    tensors = harness.inputs(torch.float32, CPU, kv_heads=2, q_len=48, k_len=keys)
    bias = torch.zeros(2, 1, 48, keys)
    bias[0, :, 3::5, 1] = value
    bias[1, :, 2::5] = -torch.inf
    bias[1, :, 2::5, -1] = value
    for names in (("out",), ("out", "lse")):
        settings = {"bias": bias, "return_aux": "lse" in names, "gradients": False}
        ours, exact = (
            harness.run(tensors, direction(tensors), tritonattn.scaled_attention, backend=backend, **settings)
            for backend in ("sdpa", "reference")
        )
        for name in names:
            assert torch.equal(ours[name].isnan(), exact[name].isnan()), name
    assert taken == [taken[0]]
    assert taken[0] is not None


@pairwise(
    mask=["causal", "window", "lengths", "everything"],
    largest=[10.0, 60.0, 1e3, 1e4],
    scales=[(), ("query_scale",)],
    scale=[0.3, 1.0],
)
def test_large_logits(mask, largest, scales, scale):
    """The kernel's backward rounds logits as its forward does; where this is not enough, tiles compute the call."""
    tensors, arguments = of_form("plain", torch.float32, mask, scales=scales)
    size = (tensors["q"] @ tensors["k"].repeat_interleave(2, 1).mT).abs().max() * scale
    tensors["q"] *= largest / size
    check(tensors, **arguments | {"scale": scale})


def test_the_kernel_multiplies_by_powers_of_two_where_a_backward_comes(monkeypatch):
    scales, kernel = [], by_parts._forward
    monkeypatch.setattr(by_parts, "_forward", lambda *a, **b: scales.append(b["scale"]) or kernel(*a, **b))
    for scale in (0.3, -0.3, 0.125, 3.0, 0.0):
        tensors, arguments = of_form("plain", torch.float32, "window", scales=())
        run(tensors, direction(tensors), **arguments | {"scale": scale})
    assert {math.frexp(scale)[0] for scale in scales} == {0.5}
    scales.clear()
    check(tensors, gradients=False, **arguments | {"scale": 0.3})
    assert set(scales) == {0.3}


@pytest.mark.parametrize("layout", ["of rows", "transposed"])
def test_a_bias_whose_keys_lie_apart_is_copied_a_few_rows_at_a_time(layout, monkeypatch):
    sizes, kernel = [], by_parts._forward
    monkeypatch.setattr(by_parts, "_forward", lambda *a, **b: sizes.append(b["attn_mask"].shape[2]) or kernel(*a, **b))
    tensors, _ = of_form("plain", torch.float32, scales=())
    bias = torch.randn(1, 4, 21, 1) if layout == "of rows" else torch.randn(1, 4, 29, 21).mT
    check(tensors, gradients=False, bias=bias)
    assert max(sizes) <= parts._ROWS


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e15])
@pytest.mark.parametrize("operand", ["q", "k", "v"])
@pytest.mark.parametrize(
    "mask", [{"causal": True, "window": (5, None)}, {"window": (3, 3)}, {"key_bias": True}], ids=str
)
def test_a_spoiled_sequence_changes_no_bit_of_its_neighbours(mask, operand, poison):
    random, starts = torch.Generator().manual_seed(0), torch.tensor([0, 30, 52, 90], dtype=torch.int32)
    tensors = {name: torch.randn(90, 2, 16, generator=random) for name in "qkv"}
    arguments = dict(mask)
    if "key_bias" in mask:
        arguments["key_bias"] = torch.randn(2, 90, generator=random)

    def results(**tensors):
        leaves = [x.clone().requires_grad_() for x in tensors.values()]
        out = tritonattn.attention_varlen(*leaves, starts, starts, 38, 38, **arguments)
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    clean = results(**tensors)
    tensors[operand] = tensors[operand].clone()
    tensors[operand][35, 1, 3] = poison
    others = torch.cat([torch.arange(30), torch.arange(52, 90)])
    for found, expected in zip(results(**tensors), clean, strict=True):
        assert torch.equal(found[others], expected[others])
