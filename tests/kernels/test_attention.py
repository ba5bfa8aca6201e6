"""The forward and backward kernels against float64: masks, scales, dtypes, shapes, strides, NaN."""

import functools

import pytest
import torch

import tritonattn
from tests.calls.test_derivatives import CALLS
from tests.kernels import harness
from tests.kernels.harness import of_form
from tests.support.bound import assert_within_bound
from tests.support.calls import assert_extreme_sink, assert_extreme_sink_of_decode, assert_gradients_of_keys_add_up
from tests.support.masks import MASKS
from tests.support.orders import FORMS, assert_as_reference
from tests.support.pairs import in_turn, pairwise
from tests.support.slow import slow_but
from tritonattn.backends import triton as triton_backend
from tritonattn.backends.triton import launch
from tritonattn.core.terms import Needs, Terms
from tritonattn.tuning.config import Target, TileConfig

SCALES = ((), ("query_scale",), ("query_scale", "key_scale"), ("query_scale", "key_bias"))

pytestmark = pytest.mark.usefixtures("small_tiles")


@pytest.mark.parametrize("mask", MASKS)
def test_every_mask(mask, device):
    harness.check(harness.inputs(torch.float32, device), scale=0.3, **harness.mask(mask, device))


@pairwise(
    free=[("mask", "scales"), ("mask", "heads"), ("mask", "lengths"), ("mask", "form")],
    mask=MASKS,
    form=["softcap aux", "sinks dropout", "everything"],
    scales=SCALES,
    dtype=[torch.float32, torch.float16],  # Triton's interpreter truncates to bfloat16 instead of rounding
    heads=[(1, 2), (2, 1), (1, 3)],
    lengths=[(21, 35), (1, 17), (37, 2)],
    dims=[(16, 16), (17, 40)],
)
def test_every_pair_of_choices(mask, form, scales, dtype, heads, lengths, dims, device):
    (kv_heads, group), (q_len, k_len), (head_dim, value_dim) = heads, lengths, dims
    sizes = {"kv_heads": kv_heads, "group": group, "q_len": q_len, "k_len": k_len}
    tensors, arguments = of_form(form, dtype, device, scales=scales, head_dim=head_dim, value_dim=value_dim, **sizes)
    cancelling = 1.0 if q_len == 1 else 0.0  # a lone row with one key: its exact gradients are 0
    arguments = arguments | harness.mask(mask, device, 2, kv_heads * group, q_len, k_len)
    harness.check(tensors, summands=cancelling, scale=0.3, **arguments)


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")  # NaN fails the bound
@pytest.mark.parametrize("has_ranges", [False, True])
def test_terms_of_keys_in_blocks_that_need_no_mask(has_ranges, device):
    """Several in a row, the first without weight; with ranges whose ends differ in a block of rows, between such."""
    scales = ("query_scale", "key_scale", "key_bias")
    tensors = harness.inputs(torch.float32, device, batch=1, q_len=37, k_len=80, scales=scales)
    tensors["key_bias"][..., :16] = -torch.inf
    row = torch.arange(37, device=device)
    ranges = torch.stack([row % 20, 80 - row % 9], -1).int()[None] if has_ranges else None
    harness.check(tensors, key_ranges=ranges)


@pytest.mark.parametrize("window", [(1, 0), (17, 3), (30, 0), (None, 14), (None, 1)], ids=str)
def test_windows_whose_edge_is_that_of_a_tile(window, device):
    """A single row of the last tile of 16 attends to a block of keys, or all rows but a single one do."""
    harness.check(harness.inputs(torch.float32, device, q_len=48, k_len=48, batch=1, group=1), window=window)


@pytest.mark.parametrize("lengths", [(15, 16, 17), (31, 32, 33)], ids=str)
def test_lengths_whose_edge_is_that_of_a_tile(lengths, device):
    """One key fewer than fills blocks, as many, one more: no gradient reaches the one that is hidden."""
    tensors = harness.inputs(torch.float32, device, k_len=48, batch=3, group=1)
    harness.check(tensors, key_lengths=torch.tensor(lengths, device=device))


@pytest.mark.usefixtures("new_memory_holds_nan")
@pytest.mark.parametrize("writer", ["row_terms", "grad_query"])
def test_a_tile_of_rows_that_reaches_past_the_last_block_of_terms(writer, device, monkeypatch):
    """37 rows: programs that write terms, or corrected ones, have 16 of them, those that read them 32."""
    monkeypatch.setattr(launch, "config_for", lambda kernel, *_: TileConfig(16 if kernel == writer else 32, 32, 4, 1))
    harness.check(harness.inputs(torch.float32, device, q_len=37, batch=1))


@pytest.mark.parametrize(
    ("head_dim", "value_dim"), [(1, 1), (8, 24), (17, 16), (64, 64), (96, 40), (192, 128), (320, 512)]
)
def test_head_dims(head_dim, value_dim, device):
    sizes = {"head_dim": head_dim, "value_dim": value_dim, "k_len": 19, "batch": 1, "group": 1}
    harness.check(harness.inputs(torch.float32, device, scales=("query_scale", "key_scale"), **sizes), causal=True)


@in_turn(mode=tritonattn.SCALINGS, mask=["causal", "window", "ranges", "mask of heads"])
def test_every_mode(mode, mask, device):
    tensors = harness.inputs(torch.float32, device, batch=1, scales=("gain",))
    harness.check(tensors, functools.partial(tritonattn.attention, scaling=mode), **harness.mask(mask, device, 1))


HEADS = 24
FEW_KEYS = {
    "plain": {},
    "more blocks": {"length": 40, "head_dim": 64},
    "softcap": {"softcap": 30.0},
    "dropout": {"dropout_p": 0.2},
    "frozen sinks": {"sinks": torch.linspace(-3, 3, HEADS)},
    "ranges": {"key_ranges": torch.tensor([[[row // 4 * 4, row + 1] for row in range(16)]])},
}


@pytest.mark.slow
@in_turn(options=[*FEW_KEYS, "plain", "softcap", "ranges"], invariant=[False] * len(FEW_KEYS) + [True] * 3)
def test_rows_of_few_keys(options, invariant, device):
    """Sharp softmaxes, whose gradients are differences of what nearly cancels, in every head by itself."""
    arguments = {"length": 16, "head_dim": 128, **FEW_KEYS[options]}
    arguments = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    length, head_dim = arguments.pop("length"), arguments.pop("head_dim")
    sizes = {"q_len": length, "k_len": length, "head_dim": head_dim, "value_dim": head_dim}
    tensors = harness.inputs(torch.float32, device, batch=1, kv_heads=HEADS, group=1, seed=7, **sizes)
    attend = functools.partial(tritonattn.attention, scaling="key_count")
    harness.check_each_head(tensors, attend, causal=True, batch_invariant=invariant, **arguments)


@pytest.mark.parametrize("mode", ["sqrt_dim", "key_count"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # the interpreter truncates to bf16
def test_keys_and_values_with_means(mode, dtype, device):
    """delta's error reaches d_q times the mean key, so delta must not come from an output of 16 bits."""
    tensors = harness.inputs(dtype, device, batch=1, q_len=40, k_len=64, head_dim=64, value_dim=64)
    tensors |= {"k": tensors["k"] + 3, "v": tensors["v"] + 3}
    harness.check(tensors, functools.partial(tritonattn.attention, scaling=mode))


def test_scales_act_on_the_accumulated_product_in_fp32(device):
    """Logits of about 100: a scale rounded into a float16 q would move them by 0.05."""
    tensors = harness.inputs(torch.float16, device, head_dim=64, value_dim=64, batch=1, q_len=32, k_len=64)
    tensors["q"] *= 4
    random = torch.Generator().manual_seed(3)
    tensors["query_scale"] = 1.0 + torch.rand(tensors["q"].shape[:3], generator=random).to(device)
    harness.check(tensors, scale=1.0)


@pytest.mark.parametrize("size", [1e-30, 1e30, 1e33])
def test_key_norms_of_any_size(size, device):
    """Factors down to fp32's smallest number are themselves."""
    tensors = harness.inputs(torch.float32, device, batch=1, q_len=20, k_len=33)
    tensors["k"] *= size
    runs = ((tensors, "triton"), (harness.as_double(tensors), "reference"), (tensors, "reference"))
    attend = functools.partial(tritonattn.attention, scaling="key_norm_mean", causal=True)
    assert_within_bound(*(attend(**operands, backend=backend) for operands, backend in runs), torch.float32)


@pytest.mark.parametrize("size", [1e-3, 300.0, 3000.0])
def test_key_scales_of_any_size_in_float16(size, device):
    """cosine divides by the keys' norms: what is rounded to 16 bits must not depend on them."""
    tensors = harness.inputs(torch.float16, device, batch=1, head_dim=64, value_dim=64, q_len=20, k_len=33)
    tensors["k"] *= size
    harness.check(tensors, functools.partial(tritonattn.attention, scaling="cosine"), causal=True)


def test_a_hidden_key_scale_has_no_say_in_what_is_rounded(device):
    tensors = harness.inputs(torch.float16, device, q_len=20, k_len=33, scales=("key_scale",))
    tensors["key_scale"][:, :, 25:] = 1e30
    harness.check(tensors, scale=0.3, key_lengths=torch.tensor([25, 11], device=device))


@in_turn(
    mask=["lengths", "causal lengths", "mask of keys", "window", "ranges", "ranges", "mask of keys"],
    poison=[float("nan"), float("inf")],
    q_len=[20, 20, 1, 20, 20, 20, 1],
    invariant=[False] * 5 + [True] * 2,
)
def test_hidden_keys_reach_nothing(mask, poison, q_len, invariant, device):
    tensors = harness.inputs(torch.float32, device, scales=("query_scale", "key_scale"), q_len=q_len)
    arguments = harness.mask(mask, device, q_len=q_len)
    if mask == "ranges":
        arguments["key_ranges"] = arguments["key_ranges"].clamp(7, 30)
    visibility = tritonattn.core.visibility.Visibility.of(tensors["q"], tensors["k"], **arguments)
    hidden = ~visibility.seen_keys().expand(tensors["k"].shape[:3])
    assert hidden.any()
    arguments["batch_invariant"] = invariant
    clean = harness.by_kernels(tensors, **arguments)
    for name in ("k", "v", "key_scale"):
        assert (clean[name][hidden] == 0).all(), name
        tensors[name][hidden] = poison
    harness.assert_same(harness.by_kernels(tensors, **arguments), clean)


def test_nan_in_a_row_without_keys_reaches_no_gradient(device):
    tensors = harness.inputs(torch.float32, device, q_len=30, k_len=20)
    tensors["q"][:, :, :5] = float("nan")
    found = harness.by_kernels(tensors, causal=True)
    assert [name for name, result in found.items() if not result.isfinite().all()] == []
    assert (found["out"][:, :, :10] == 0).all()


def test_as_with_tensor_memory(device, monkeypatch):
    """The row terms and sums of sm_100's kernels."""
    if device.type == "cuda":
        pytest.skip("kernels are compiled for this GPU")
    monkeypatch.setattr(Target, "of", classmethod(lambda cls, device: cls("cuda", "100")))
    harness.check(harness.inputs(torch.float16, device, scales=("query_scale", "key_scale")), causal=True)


@pytest.mark.parametrize("sink", slow_but([-torch.inf], [torch.inf, -torch.inf, torch.nan]))
def test_sinks_that_are_not_finite(sink, device):
    """In attention, and in decoding of one split and of several."""
    assert_extreme_sink(sink, "triton", device)
    for keys in (9, 150):
        assert_extreme_sink_of_decode(sink, "triton", keys, device)


def test_gradients_of_keys_add_up_before_they_are_rounded(device):
    assert_gradients_of_keys_add_up("triton", device, tolerance=2e-3)


def _of_ranges(tensors: harness.Tensors, ranges: torch.Tensor) -> torch.Tensor:
    visibility = tritonattn.core.visibility.Visibility.of(tensors["q"], tensors["k"], key_ranges=ranges)
    call = tritonattn.core.call.AttentionCall(*tensors.values(), visibility, Terms(0.3))
    return triton_backend.forward(call, aux=False).out


def test_ranges_past_int32(device):
    """On a GPU nobody reads them: they are clamped before they become 32 bits wide."""
    tensors = harness.inputs(torch.float32, device, q_len=20, k_len=33)
    ranges = torch.tensor([[0, 2**40], [-(2**40), 2**31 + 7], [2**31 - 1, 2**31 - 1]], device=device)
    ranges = ranges.repeat(2, 7, 1)[:, :20]
    found = _of_ranges(tensors, ranges)
    assert torch.equal(found, _of_ranges(tensors, ranges.clamp(0, 33)))
    assert found[:, :, :2].all()


def test_a_factor_below_the_normal_numbers(device):
    tensors = harness.inputs(torch.float16, device, batch=1, q_len=20, k_len=20)
    tensors["query_scale"] = torch.ones(1, 2, 20, device=device)
    assert all(result.isfinite().all() for result in harness.by_kernels(tensors, scale=1e-39).values())


def test_the_gradient_of_k_alone_is_no_other(device):
    q, k, v = harness.inputs(torch.float32, device, batch=1, head_dim=64, value_dim=64).values()
    visibility = tritonattn.core.visibility.Visibility.of(q, k, causal=True)
    call = tritonattn.core.call.AttentionCall(q, k, v, visibility, Terms(1.0))
    result = triton_backend.forward(call, aux=False)
    together, alone = (
        triton_backend.backward(call, *result[:2], q, tritonattn.core.call.RowGradients(), Needs(others, True, others))
        for others in (True, False)
    )
    assert torch.equal(together.k, alone.k)
    assert alone.q is None


@pytest.mark.parametrize("lone", ["one key", "a row of many"])
def test_a_row_of_one_key_gives_its_query_no_rounding(lone, device):
    """In fp32, where a block of rows has few keys: its softmax is 1, whatever its logit."""
    has_one = torch.arange(21, device=device) % (1 if lone == "one key" else 3) == 0
    tensors = harness.inputs(torch.float32, device, k_len=1 if lone == "one key" else 35)
    first = torch.arange(21, device=device).clamp(max=tensors["k"].shape[2] - 1)
    last = torch.where(has_one, first + 1, 35)
    ranges = torch.stack([torch.where(has_one, first, 0), last], -1).expand(2, 21, 2)
    masks = {} if lone == "one key" else {"key_ranges": ranges}
    q, k, v = (x.requires_grad_() for x in tensors.values())
    out = tritonattn.attention(q, k, v, scaling="key_count", backend="triton", **masks)
    d_q = torch.autograd.grad((out * torch.linspace(-1, 2, 16, device=device)).sum(), q)[0]
    assert d_q[:, :, has_one].count_nonzero() == 0
    assert (d_q[:, :, ~has_one] != 0).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@in_turn(call=CALLS, form=FORMS)
def test_derivatives_beyond_the_first(call, form, device):
    assert_as_reference(CALLS[call](), form, "triton", 2e-4, torch.float32, device)
