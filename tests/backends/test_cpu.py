"""Tiles in plain torch against the reference in fp64: every mask, option and gradient, across tile edges."""

import functools

import pytest
import torch

import tritonattn
from tests.kernels import harness
from tests.support.masks import MASKS, visible_pairs
from tests.support.pairs import in_turn, pairwise
from tests.support.watch import Watch
from tritonattn.backends.cpu import by_parts, tiles, torch_kernel

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = {"q_len": 21, "k_len": 29}  # with `small_tiles` several tiles of each and a part of one
BOTH = ("query_scale", "key_scale")
ALL = (*BOTH, "key_bias")
FORMS = ["plain", "softcap", "dropout", "everything"]

inputs = functools.partial(harness.inputs, device=CPU, kv_heads=2, value_dim=8)
check = functools.partial(harness.check, backend="sdpa")
run = functools.partial(harness.run, attend=tritonattn.scaled_attention, backend="sdpa")


@pytest.fixture(autouse=True)
def _leave_pytorchs_kernel_out(monkeypatch):
    monkeypatch.setattr(torch_kernel, "supports", lambda *call: False)
    monkeypatch.setattr(by_parts, "takes", lambda call: False)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 rows (over a group's heads) and 8 keys, two heads at a time."""
    monkeypatch.setattr(tiles, "_ROWS", 16)
    monkeypatch.setattr(tiles, "KEYS", 8)
    monkeypatch.setattr(tiles, "_PAIRS", 256)


def of_form(form, dtype=torch.float64, mask="full", kv_heads=2, scales=ALL):
    sizes = {"kv_heads": kv_heads, "group": 4 // kv_heads, "value_dim": 8, **SIZES}
    tensors, arguments = harness.of_form(form, dtype, CPU, scales=scales, **sizes)
    return tensors, {"scale": 0.3, **arguments, **MASKS[mask](2, 4, *SIZES.values())}


SHAPES = {"every pair": (2, 4, 21, 29), "keys of heads": (1, 4, 1, 29), "rows": (2, 1, 21, 1)}
EXTENTS = {"both sides": (1, 4, 1, 49, 28), "of rows": (2, 4, 21, 6, 2), "longer than keys": (2, 1, 21, 60, 30)}


@pairwise(
    dense=SHAPES,
    table=EXTENTS,
    mask=["full", "causal window", "ranges", "mask of heads", "everything"],
    form=["plain", "everything", "after softcap"],
    dtype=[torch.float64, torch.bfloat16],
    values=["read", "not read"],
)
@pytest.mark.usefixtures("small_tiles")
def test_biases_of_pairs(dense, table, mask, form, dtype, values, monkeypatch):
    if values == "not read":
        monkeypatch.setattr(tiles, "readable", lambda device: False)
    tensors, arguments = of_form("everything" if form == "after softcap" else form, dtype, mask)
    random, (*shape, right) = torch.Generator().manual_seed(2), EXTENTS[table]
    for name, size in (("bias", SHAPES[dense]), ("relative_bias", shape)):
        tensors[name] = torch.randn(size, generator=random, dtype=torch.float64).to(dtype)
    arguments |= {"relative_right": right, "bias_after_softcap": form == "after softcap", "return_aux": True}
    check(tensors, **arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("softcap", [0.5, 30.0, 256.0, 1e4])
def test_softcaps_of_16_bits(softcap, dtype):
    """By exp, which errs by the softcap's eps, up to 256."""
    tensors, arguments = of_form("plain", dtype, "causal window", scales=())
    check(tensors, **arguments | {"softcap": softcap})
    with torch.no_grad():
        far = {**tensors, "q": 1e4 * tensors["q"].sign()}
        assert run(far, direction(far), gradients=False, **arguments, softcap=softcap)["out"].isfinite().all()


def test_small_logits_keep_their_digits_under_a_softcap():
    """Values are the signs of keys: out is the tanh of logits up to 0.08, of which 50 * eps is the fourth digit."""
    q = torch.randn(1, 1, 64, 8, generator=torch.Generator().manual_seed(0)) / 100
    sign = torch.tensor([1.0, -1.0])[:, None].expand(1, 1, 2, 8)
    out = tritonattn.attention(q, sign, sign, scaling="none", softcap=50.0, backend="sdpa")
    expected = q.double().sum(-1, keepdim=True).tanh().expand(out.shape)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-7)


def direction(tensors):
    """A random gradient of out."""
    q, v = tensors["q"], tensors["v"]
    random = torch.Generator().manual_seed(1)
    return torch.randn(*q.shape[:-1], v.shape[-1], generator=random, dtype=torch.float64).to(q.dtype)


@pairwise(mask=MASKS, form=FORMS, dtype=DTYPES, kv_heads=[1, 2, 4], scales=[(), BOTH, ALL])
@pytest.mark.usefixtures("small_tiles")
def test_masks_options_and_dtypes(mask, form, dtype, kv_heads, scales):
    tensors, arguments = of_form(form, dtype, mask, kv_heads, scales)
    check(tensors, **arguments | {"return_aux": True})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("root", "dim"), [(1, 128), (2, 128), (1, 64)])
def test_rows_of_few_keys(form, root, dim):
    """Sharp softmaxes, whose gradients are differences of what nearly cancels, in every head by itself."""
    sizes = {"batch": 1, "kv_heads": 50, "group": 1, "q_len": 16, "k_len": 16, "head_dim": dim, "value_dim": dim}
    tensors, arguments = harness.of_form(form, torch.float32, CPU, seed=7, **sizes)
    tensors["query_scale"] = torch.arange(1.0, 17).pow(-1 / root).repeat(1, 50, 1)
    arguments |= {"scale": 1.0, "causal": True, "return_aux": False, "backend": "sdpa"}
    harness.check_each_head(tensors, tritonattn.scaled_attention, **arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["ranges", "mask", "dropout"])
@pytest.mark.usefixtures("small_tiles")
def test_a_row_of_one_key_gives_its_query_what_lse_asks_for(form, dtype):
    """And no rounding, among rows that attend to keys of several tiles."""
    row, keys = torch.arange(21), torch.arange(29)
    lone = row % 3 == 1
    first, end = torch.where(lone, row, 0), torch.where(lone, row + 1, 29)
    arguments = {"scale": 0.3, "key_ranges": torch.stack([first, end], -1).expand(2, 21, 2)}
    if form == "mask":
        arguments = {"scale": 0.3, "mask": ((first[:, None] <= keys) & (keys < end[:, None]))[None, None]}
    arguments["dropout_p"] = 0.3 if form == "dropout" else 0.0
    tensors = inputs(dtype, scales=BOTH, **SIZES)
    gradients = run(tensors, direction(tensors), **arguments)
    for name in ("q", "query_scale"):
        assert gradients[name][:, :, lone].count_nonzero() == 0, name
        assert gradients[name][:, :, ~lone].count_nonzero() > 0, name
    check(tensors, return_aux=True, **arguments)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 130), (17, 37), (37, 17), (130, 130), (600, 1100)], ids=str)
def test_lengths(lengths):
    tensors = inputs(torch.float32, batch=1, q_len=lengths[0], k_len=lengths[1], scales=BOTH)
    for mask in ["causal", "ranges"] if max(lengths) < 600 else ["causal lengths"]:
        check(tensors, scale=0.3, return_aux=True, **MASKS[mask](1, 4, *lengths))


@pytest.mark.parametrize(("dim", "value_dim"), [(1, 1), (3, 200), (96, 5), (256, 256)])
@pytest.mark.usefixtures("small_tiles")
def test_head_dims(dim, value_dim):
    check(inputs(torch.float32, head_dim=dim, value_dim=value_dim, **SIZES), window=(9, 4))


@in_turn(kv_heads=[1, 3, 24], pairs=[1, 1 << 10, 1 << 30, 1])
@pytest.mark.usefixtures("small_tiles")
def test_heads_and_batch_entries_in_any_parts(kv_heads, pairs, monkeypatch):
    monkeypatch.setattr(tiles, "_PAIRS", pairs)
    tensors = inputs(torch.float64, batch=3, kv_heads=kv_heads, group=24 // kv_heads, q_len=9, k_len=11, scales=BOTH)
    check(tensors, return_aux=True, **MASKS["everything"](3, 24, 9, 11))


@pairwise(
    mask=["causal lengths", "causal ranges", "everything"],
    poison=[torch.nan, torch.inf, -torch.inf],
    form=["plain", "everything"],
)
@pytest.mark.usefixtures("small_tiles")
def test_keys_hidden_from_every_row_reach_nothing(mask, poison, form):
    assert_hidden_values_reach_nothing(mask, poison, form)


def assert_hidden_values_reach_nothing(mask, poison, form):
    tensors, arguments = of_form(form, mask=mask, scales=BOTH)
    visible = visible_pairs((2, 4, *SIZES.values()), **MASKS[mask](2, 4, *SIZES.values()))
    unseen = ~visible.unflatten(1, (2, 2)).any(3).any(2)  # [B, Hkv, Sk]
    blind = ~visible.any(-1)  # [B, Hq, Sq]
    assert unseen.any()
    assert blind.any() or mask == "causal lengths"
    d_out = direction(tensors)
    clean = run(tensors, d_out, **arguments)
    for name, hidden in (("k", unseen), ("v", unseen), ("key_scale", unseen), ("q", blind), ("query_scale", blind)):
        tensors[name][hidden] = poison
    d_out[blind] = poison
    harness.assert_same(run(tensors, d_out, **arguments), clean)


@pytest.mark.usefixtures("small_tiles")
def test_only_what_is_asked_for_has_a_gradient():
    tensors, arguments = of_form("everything", mask="causal")
    arguments["return_aux"], d_out = False, direction(tensors)
    every = run(tensors, d_out, **arguments)
    for name in tensors:
        leaves = {other: x.clone().requires_grad_(other == name) for other, x in tensors.items()}
        torch.manual_seed(4)
        out = tritonattn.scaled_attention(**leaves, backend="sdpa", **arguments)
        torch.testing.assert_close(torch.autograd.grad(out, leaves[name], d_out)[0], every[name], rtol=0, atol=0)


@pytest.mark.parametrize("mask", MASKS)
def test_where_values_cannot_be_read(mask, small_tiles, monkeypatch):
    monkeypatch.setattr(tiles, "readable", lambda device: False)
    tensors, arguments = of_form("everything", mask=mask)
    check(tensors, **arguments)


def test_keys_and_values_with_means(small_tiles):
    """An error of delta reaches d_q times the mean key, so delta must not come from an output of 16 bits."""
    tensors = inputs(torch.bfloat16, q_len=40, k_len=64, head_dim=64, value_dim=64)
    check(tensors | {"k": tensors["k"] + 10, "v": tensors["v"] + 10}, scale=0.3, return_aux=True)


def packed(length, document):
    """Ranges of documents that lie one after the other."""
    start = torch.arange(length) // document * document
    return torch.stack([start, start + document], -1)[None].int()


LENGTH = 2048
LONG = {  # and the keys of a block of rows
    "window": ({"causal": True, "window": (256, None)}, 512),
    "lengths": ({"key_lengths": torch.tensor([500])}, 512),
    "ranges": ({"key_ranges": packed(LENGTH, 512)}, 512),
    "mask of keys": ({"mask": (torch.arange(LENGTH) < 200)[None, None, None]}, 256),
}


@pytest.mark.parametrize("mask", LONG)
def test_memory_grows_with_the_length_alone_and_hidden_tiles_are_skipped(mask):
    masks, keys = LONG[mask]
    tensors = inputs(torch.float32, batch=1, kv_heads=1, q_len=LENGTH, k_len=LENGTH, scales=BOTH)
    with Watch() as forward, torch.no_grad():
        tritonattn.scaled_attention(**tensors, backend="sdpa", **masks)
    with Watch() as both:
        run(tensors, direction(tensors), return_aux=True, **masks)
    inputs_bytes = 4 * LENGTH * 2 * 16  # of q
    assert both.largest <= max(4 * tiles._PAIRS, 3 * inputs_bytes)
    blocks = LENGTH // (tiles._ROWS // 2)
    assert forward.calls["aten::bmm"] <= blocks * (keys // tiles.KEYS)


@pytest.mark.usefixtures("small_tiles")
def test_inputs_stay_as_they_are_and_results_repeat():
    tensors, arguments = of_form("everything", torch.float32, "everything")
    before, d_out = {name: x.clone() for name, x in tensors.items()}, direction(tensors)
    first, second = (run(tensors, d_out, **arguments) for _ in range(2))
    harness.assert_same(tensors, before)
    harness.assert_same(first, second)
