"""Biases of pairs, dense and by distance, before a softcap and behind it, against their formula in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tritonattn
from tests.kernels import harness
from tests.support.bound import assert_within_bound
from tests.support.masks import MASKS, visible_pairs
from tests.support.packed import Packed, packed_operands
from tests.support.paged_calls import paged_call
from tests.support.pair_biases import Tensors, by_formula
from tests.support.pairs import in_turn
from tritonattn.backends import triton as backend
from tritonattn.backends.triton import attention, launch
from tritonattn.core.call import AttentionCall, ForwardResult, Gradients, Logits, Needs
from tritonattn.core.sequences import Sequences
from tritonattn.core.visibility import Visibility
from tritonattn.tuning import Problem, Target
from tritonattn.tuning.defaults import gluon_config

HALF, SINGLE = torch.float16, torch.float32


def with_biases(
    tensors: Tensors, dtype: torch.dtype, dense: tuple[int, ...] | None, relative: tuple[int, ...] | None
) -> Tensors:
    """The tensors, a bias of shape `dense` and a relative one of shape `relative`, some -inf among them."""
    random, kv_heads = torch.Generator().manual_seed(3), tensors["k"].shape[1]
    tensors = dict(tensors)
    if "key_bias" in tensors:
        tensors["key_bias"] = tensors["key_bias"].unflatten(1, (kv_heads, -1))
    for name, shape in (("bias", dense), ("relative_bias", relative)):
        if shape is not None:
            bias = 2 * torch.randn(shape, generator=random)
            bias.view(-1)[::5] = -torch.inf
            tensors[name] = bias.to(tensors["q"].device, dtype)
    return tensors


def call_of(tensors: Tensors, visibility: Visibility, scale: float = 0.3, **options: Any) -> AttentionCall:
    terms = {name: x for name, x in tensors.items() if name not in "qkv"}
    q, k, v = (tensors[name] for name in "qkv")
    return AttentionCall(q, k, v, visibility, Logits(scale, **terms, **options))


def results(call: AttentionCall, d_out: Tensor, d_lse: Tensor) -> tuple[ForwardResult, Gradients]:
    """out and aux of the kernels, and gradients of every tensor of the call."""
    rounding = torch.zeros(d_out.shape, dtype=torch.int8, device=d_out.device) if call.q.dtype == HALF else None
    found = backend.forward(call, True, rounding)
    needs = Needs(*(x is not None for x in call.tensors))
    return found, backend.backward(call, found.out, found.lse, d_out, d_lse, needs, rounding)


def check(
    tensors: Tensors, visibility: Visibility, visible: Tensor, own: Tensor, summands: float = 0.0, **options: Any
) -> None:
    """Hold all results and gradients to the bound."""
    random, dtype = torch.Generator().manual_seed(1), tensors["q"].dtype
    d_out = torch.randn(*tensors["q"].shape[:3], tensors["v"].shape[3], generator=random).to(tensors["q"])
    d_lse = torch.linspace(-1, 1, d_out[..., 0].numel()).reshape(d_out.shape[:3]).to(d_out.device)
    found, gradients = results(call_of(tensors, visibility, **options), d_out, d_lse)
    exact, eager = (expected(tensors, to, d_out, d_lse, visible, own, **options) for to in (torch.float64, dtype))
    ours = found._asdict() | {f"d_{name}": x for name, x in gradients._asdict().items() if x is not None}
    assert ours.keys() == exact.keys()
    for name, result in ours.items():
        hidden = exact[name].isneginf()
        assert torch.equal(result.isneginf(), hidden), name
        if name[2:] in tensors:
            assert (result.dtype, result.shape) == (tensors[name[2:]].dtype, tensors[name[2:]].shape), name
        values = (x.masked_fill(hidden, 0) for x in (result, exact[name], eager[name]))
        assert_within_bound(*values, dtype, name=name, summands=summands if name.startswith("d_") else 0.0)


def expected(
    tensors: Tensors, dtype: torch.dtype, d_out: Tensor, d_lse: Tensor, visible: Tensor, own: Tensor, **options: Any
) -> Tensors:
    """The same by the formula, in dtype; vectors of the logits are at least fp32."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {name: x.to(dtype if name in "qkv" else wide).requires_grad_() for name, x in tensors.items()}
    operands = {name: x.to(wide) if dtype == HALF else x for name, x in leaves.items()}
    found = by_formula(operands, visible, own, **{"scale": 0.3, **options})
    lse = torch.where(found.lse.isneginf(), 0, found.lse)
    loss = (found.out * d_out.to(found.out.dtype)).sum() + (lse * d_lse).sum()
    of_leaves = torch.autograd.grad(loss, list(leaves.values()))
    named = found._replace(out=found.out.to(dtype))._asdict()
    gradients = {f"d_{name}": x for name, x in zip(leaves, of_leaves, strict=True)}
    return {name: x.detach() for name, x in named.items()} | gradients


def of_mask(name: str, device: torch.device, sizes: tuple[int, int, int, int], kv_heads: int):
    """A `Visibility` by one of MASKS, its visible pairs, and the keys at which rows stand."""
    batch, heads, q_len, k_len = sizes
    arguments = harness.mask(name, device, *sizes)
    shapes = torch.Size((batch, heads, q_len, 1)), torch.Size((batch, kv_heads, k_len, 1))
    pairs = visible_pairs(sizes, **MASKS[name](*sizes)).to(device)
    own = torch.arange(q_len, device=device)[None] + k_len - q_len
    return Visibility.of_shapes(*shapes, device, **arguments), pairs, own


@pytest.mark.usefixtures("small_tiles")
@in_turn(
    mask=MASKS,
    form=["relative", "dense", "both", "row of tables"],
    dtype=[SINGLE, HALF, SINGLE],
    softcap=[None, (1.5, False), (1.5, True)],
    scales=[("query_scale",), ("query_scale", "key_scale"), ("query_scale", "key_bias", "sinks"), ()],
    heads=[(2, 1), (1, 2), (1, 3)],
)
def test_every_mask(mask, form, dtype, softcap, scales, heads, device):
    (kv_heads, group), (q_len, k_len) = heads, (21, 35)
    sizes = (2, kv_heads * group, q_len, k_len)
    shapes = {
        "relative": (None, (2, sizes[1], q_len, 50)),
        "dense": (sizes, None),
        "both": ((1, sizes[1], q_len, 1), (2, 1, 1, 13)),
        "row of tables": (None, (1, sizes[1], 1, 20)),
    }
    tensors = harness.inputs(dtype, device, kv_heads=kv_heads, group=group, scales=scales, q_len=q_len, k_len=k_len)
    tensors = with_biases(tensors, dtype, *shapes[form])
    options = {"relative_right": 7 if form != "dense" else 0}
    if softcap is not None:
        options |= dict(zip(("softcap", "bias_after_softcap"), softcap, strict=True))
    check(tensors, *of_mask(mask, device, sizes, kv_heads), **options)


SIZES = (2, 2, 21, 35)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("relative", [(1, 2, 1, 1), (2, 1, 21, 3), (1, 2, 21, 16), (1, 1, 1, 60)], ids=str)
@pytest.mark.parametrize("right", [0, 2, 40])
def test_extents_shorter_and_longer_than_the_keys(relative, right, device):
    tensors = with_biases(harness.inputs(SINGLE, device), SINGLE, None, relative)
    check(tensors, *of_mask("full", device, SIZES, 1), relative_right=right)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("mask", ["causal", "ranges", "mask of heads"])
def test_what_hidden_pairs_hold_is_not_read(mask, after, device):
    """NaN in place of any number there leaves all bits of results and gradients."""
    visibility, pairs, own = of_mask(mask, device, SIZES, 1)
    tensors = with_biases(harness.inputs(SINGLE, device), SINGLE, SIZES, (2, 2, 21, 55))
    options = {"softcap": 1.5, "bias_after_softcap": after, "relative_right": 20}
    d_out = torch.ones_like(tensors["q"])
    found = []
    for hidden in (0.0, torch.nan):
        dense = tensors["bias"].masked_fill(~pairs, hidden)
        entry = own[..., None] - torch.arange(35, device=device) + 20  # [1, 21, 35], all inside
        of_pairs = torch.zeros(2, 2, 21, 55, dtype=torch.bool, device=device).scatter(3, entry.expand(SIZES), pairs)
        table = tensors["relative_bias"].masked_fill(~of_pairs, hidden)
        call = call_of(tensors | {"bias": dense, "relative_bias": table}, visibility, **options)
        found.append([x for one in results(call, d_out, d_out[..., 0]) for x in one])
    assert all(x is y or torch.equal(x, y) for x, y in zip(*found, strict=True))


SOFTCAPS = [{}, {"softcap": 1.5}, {"softcap": 1.5, "bias_after_softcap": True}]
NO_NUMBERS = pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's, of NaN


@NO_NUMBERS
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["bias", "relative_bias"])
@pytest.mark.parametrize("softcap", SOFTCAPS[::2], ids=str)
def test_nan_and_infinity_are_in_the_rows_that_see_them(name, value, softcap, device):
    visibility, *_ = of_mask("causal", device, SIZES, 1)
    tensors = with_biases(harness.inputs(SINGLE, device), SINGLE, SIZES, (2, 2, 21, 35))
    tensors[name][1, 0, 7, 9] = value
    found = backend.forward(call_of(tensors, visibility, **softcap), True)
    nan = torch.zeros(2, 2, 21, dtype=torch.bool)
    nan[1, 0, 7] = True
    for result in found:
        assert torch.equal(result.isnan().cpu(), nan[..., None].expand(result.shape) if result.dim() > 3 else nan)


@NO_NUMBERS
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("softcap", SOFTCAPS, ids=str)
def test_values_that_are_no_numbers_act_as_in_key_bias(value, softcap, device):
    """In results and gradients; -inf stands at all keys of a head, whose rows then have none."""
    visibility, *_ = of_mask("causal", device, SIZES, 1)
    tensors = harness.inputs(SINGLE, device, scales=("query_scale",))
    bias = torch.randn(2, 2, 35, generator=torch.Generator().manual_seed(0)).to(device)
    bias[1, 0, slice(None) if value == -torch.inf else 9] = value
    d_out = torch.ones_like(tensors["q"])
    (of_pairs, gradients), (of_keys, expected) = (
        results(call_of(tensors | given, visibility, **softcap), d_out, d_out[..., 0])
        for given in ({"bias": bias[:, :, None]}, {"key_bias": bias[:, None]})
    )
    assert all(
        x.equal(y) or torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(of_pairs, of_keys, strict=True)
    )
    is_capped = value == torch.inf and softcap == SOFTCAPS[1]
    assert of_pairs.out[1, 0].isnan().any() == (value != -torch.inf and not is_capped)
    assert of_pairs.lse[1, 0].isneginf().all() == (value == -torch.inf)
    expected = expected._replace(bias=expected.key_bias.flatten(1, 2)[:, :, None], key_bias=None)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, equal_nan=True)


@NO_NUMBERS
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("softcap", SOFTCAPS, ids=str)
def test_a_table_of_distances_acts_as_the_bias_of_its_pairs(softcap, dtype, device):
    """To the bits, gradients included, with NaN, inf and a row without keys; each entry belongs to one pair."""
    visibility, pairs, own = of_mask("causal", device, SIZES, 1)
    tensors = harness.inputs(SINGLE, device, scales=("query_scale", "key_scale"))
    bias = torch.randn(SIZES, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    bias[1, 0, 7, 9], bias[1, 1, 3, 2], bias[0, 1, 4] = torch.nan, torch.inf, -torch.inf
    entry = (own[..., None] - torch.arange(35, device=device) + 20).expand(SIZES)  # all inside
    table = torch.zeros(2, 2, 21, 55, device=device, dtype=dtype).scatter(3, entry, bias)
    d_out = torch.ones_like(tensors["q"])
    (of_table, gradients), (of_pairs, expected) = (
        results(call_of(tensors | given, visibility, **softcap), d_out, d_out[..., 0])
        for given in ({"relative_bias": table, "relative_right": 20}, {"bias": bias})
    )
    assert of_table.lse[0, 1, 4] == -torch.inf
    assert of_table.out[1, 0, 7].isnan().all()
    assert gradients.relative_bias.dtype == dtype
    d_table = gradients.relative_bias.gather(3, entry)
    gradients = gradients._replace(bias=d_table, relative_bias=None)
    for ours, theirs in zip((*of_table, *gradients), (*of_pairs, *expected), strict=True):
        assert ours is theirs is None or torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7))
    assert not expected.bias[0, 1, 4].any()
    assert not expected.bias[~pairs.expand(SIZES)].any()


@pytest.mark.usefixtures("small_tiles")
def test_gradients_of_shared_entries_have_the_same_bits_each_time(device):
    """Sums over rows, heads and batch entries, in one order."""
    tensors = with_biases(harness.inputs(HALF, device), HALF, (1, 1, 21, 1), (1, 1, 1, 20))
    visibility, *_ = of_mask("causal", device, SIZES, 1)
    d_out = torch.randn(tensors["q"].shape, generator=torch.Generator().manual_seed(1)).to(tensors["q"])
    found = [results(call_of(tensors, visibility), d_out, d_out[..., 0].float())[1] for _ in range(3)]
    for name in ("bias", "relative_bias"):
        first, *others = (getattr(gradients, name) for gradients in found)
        assert first.any()
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16])
def test_biases_of_16_bits_are_read_as_such(dtype):
    """No copy in another dtype is made for a launch."""
    tensors = with_biases(harness.inputs(dtype, torch.device("cpu")), dtype, SIZES, (1, 2, 1, 20))
    visibility, *_ = of_mask("causal", torch.device("cpu"), SIZES, 1)
    with launch.recording(Target.parse("sm_90")) as launches:
        results(call_of(tensors, visibility), torch.ones_like(tensors["q"]), torch.ones(SIZES[:3]))
        backend.decode(call_of(tensors, replace(visibility, at_lengths=True)), True)
    read = [one.arguments for one in launches if "bias" in one.arguments]
    assert len(read) == 4
    for arguments, name in ((one, name) for one in read for name in ("bias", "relative_bias")):
        assert arguments[name].ptr is tensors[name]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_packed_sequences(mask, after, device):
    """A row's distances are those of its own sequence; tables of rows lie in the packed axis."""
    packed = Packed((3, 18, 5, 1, 0), (20, 18, 2, 6, 3), q_tail=2, k_tail=3)
    arguments = {name: x for name, x in packed.arguments(device).items() if name.startswith("cu")}
    starts = [x.int() for x in arguments.values()]
    tensors = {
        name: x.detach().transpose(0, 1)[None].to(device).nan_to_num(0.0)
        for name, x in packed_operands(packed, SINGLE, (4, 2), (16, 16)).items()
    }
    tensors = with_biases(tensors, SINGLE, None, (1, 4, packed.q_len, 9))
    sequences = Sequences.of(*starts, packed.q_len, packed.k_len, 18, 20)
    visibility = Visibility.of(tensors["q"], tensors["k"], sequences=sequences, causal=mask == "causal")
    own = torch.zeros(packed.q_len, dtype=torch.int64)
    for rows, keys in packed.members():
        own[rows] = torch.arange(rows.start, rows.stop) - rows.stop + keys.stop
    pairs = packed.visible(causal=mask == "causal").to(device)
    options = {"relative_right": 4, "softcap": 1.5, "bias_after_softcap": after}
    check(tensors, visibility, pairs, own[None].to(device), **options)


@pytest.mark.usefixtures("small_tiles")
def test_pages(device):
    """The bits of the same call over packed keys."""
    rows = Packed((1, 18, 0, 3), (20, 18, 5, 40), q_tail=2, k_tail=3)
    table = torch.randn(1, 2, rows.q_len, 30, generator=torch.Generator().manual_seed(2)).to(device)
    calls = paged_call(rows, SINGLE, 16, causal=True, device=device)
    found, expected = (
        backend.forward(replace(call, logits=call.logits._replace(relative_bias=table, relative_right=3)), aux=True)
        for call in calls
    )
    assert all(map(torch.equal, found, expected))


@in_turn(
    lengths=[(60, 150), (5, 150), (171, 16)],
    counts=[None, (2, 3), (0, 1)],
    left=[None, 70, 20],
    softcap=[{}, {"softcap": 1.5}, {"softcap": 1.5, "bias_after_softcap": True}],
    tables=[(2, 4, 3, 200), (1, 4, 1, 40), (1, 1, 3, 171)],
    right=[2, 0, 9],
    dtype=[SINGLE, HALF, SINGLE],
)
def test_decode(lengths, counts, left, softcap, tables, right, dtype, device):
    """Caches of several splits, in one piece and in pages: distances count from the end of each sequence's keys."""
    rows, keys = 3, 176
    tensors = harness.inputs(dtype, device, kv_heads=2, group=2, q_len=rows, k_len=keys, scales=("query_scale",))
    tensors = with_biases(tensors, dtype, None, tables)
    key_lengths = torch.tensor(lengths, device=device)
    row_counts = torch.tensor(counts or (rows, rows), device=device)
    sizes = (2, 4, 2, rows, keys)
    given = None if counts is None else row_counts
    visibility = Visibility.of_padded(sizes, device, key_lengths, given, left=left)
    row, key = torch.arange(rows, device=device), torch.arange(keys, device=device)
    own = row + (key_lengths - row_counts)[:, None]  # [2, 3]
    pairs = (key <= own[..., None]) & (row < row_counts[:, None])[..., None] & (key >= own[..., None] - (left or keys))
    options = {**softcap, "relative_right": right}
    call = call_of(tensors, visibility, **options)
    found = backend.decode(call, aux=True)
    nothing = torch.zeros(())
    exact, eager = (
        expected(tensors, to, nothing, nothing, pairs[:, None], own, **options) for to in (torch.float64, dtype)
    )
    for name, result in found._asdict().items():
        hidden = exact[name].isneginf()
        assert torch.equal(result.isneginf(), hidden), name
        assert_within_bound(*(x.masked_fill(hidden, 0) for x in (result, exact[name], eager[name])), dtype, name=name)
    order = torch.randperm(22, generator=torch.Generator().manual_seed(0)).to(device)
    k, v = (torch.empty_like(x.reshape(2, 2, 11, 16, 16).transpose(1, 2).flatten(0, 1)) for x in (call.k, call.v))
    for pages, x in ((k, call.k), (v, call.v)):
        pages[order] = x.reshape(2, 2, 11, 16, 16).transpose(1, 2).flatten(0, 1)
    paged = backend.decode(replace(call, k=k, v=v, block_table=order.view(2, 11).int()), aux=True)
    assert all(map(torch.equal, paged, found))


@pytest.mark.usefixtures("small_tiles")
@in_turn(q_len=[1, 3, 1], mask=["full", "causal", "lengths"], dense=[True, True, False])
def test_few_rows(q_len, mask, dense, device, launched):
    """The decode kernel runs them, but not where a relative bias counts from other keys than the last one seen."""
    sizes = (2, 2, q_len, 150)
    tensors = harness.inputs(SINGLE, device, q_len=q_len, k_len=150)
    tensors = with_biases(tensors, SINGLE, sizes if dense else None, (1, 2, 1, 30))
    visibility, pairs, own = of_mask(mask, device, sizes, 1)
    call = call_of(tensors, visibility)
    assert backend.are_few_rows(call) == (mask != "lengths")
    found = (backend.decode if backend.are_few_rows(call) else backend.forward)(call, True)
    nothing = torch.zeros(())
    exact, eager = (expected(tensors, to, nothing, nothing, pairs, own) for to in (torch.float64, SINGLE))
    for name, result in found._asdict().items():
        assert_within_bound(result, exact[name], eager[name], SINGLE, name=name)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mask", ["causal", "window", "full"])
def test_splits(mask, device, monkeypatch):
    """Every pair has one writer where rows or keys are shared out among programs, too."""
    for name in ("splits_of_keys", "splits_of_rows"):
        monkeypatch.setattr(attention, name, lambda *sizes: 3)
    monkeypatch.setattr(launch, "_specialisations", {})  # which keep grids
    sizes = (1, 2, 37, 60)
    tensors = harness.inputs(SINGLE, device, batch=1, q_len=37, k_len=60)
    tensors = with_biases(tensors, SINGLE, (1, 2, 37, 60), (1, 2, 37, 20))
    check(tensors, *of_mask(mask, device, sizes, 1), relative_right=5)


@pytest.mark.usefixtures("small_tiles")
@in_turn(mask=["causal", "window", "lengths", "mask"], after=[False, True])
def test_batch_invariant_rows(mask, after, device):
    tensors = with_biases(harness.inputs(SINGLE, device, scales=("query_scale",)), SINGLE, SIZES, (1, 2, 1, 30))
    visibility, pairs, own = of_mask(mask, device, SIZES, 1)
    options = {"softcap": 1.5, "bias_after_softcap": after, "relative_right": 5}
    check(tensors, replace(visibility, invariant=True), pairs, own, **options)


@pytest.mark.usefixtures("small_tiles")
@in_turn(
    mask=["causal", "ranges", "mask of heads"], form=["dropout", "after", "everything"], dtype=[SINGLE, HALF, SINGLE]
)
def test_the_public_function(mask, form, dtype, device):
    scales = ("query_scale", "bias", "relative_bias")
    tensors, arguments = harness.of_form(form, dtype, device, scales=scales)
    harness.check(tensors, relative_right=3, **arguments, **harness.mask(mask, device))


@pytest.mark.usefixtures("small_tiles")
def test_mapped_biases_are_those_of_each_call(device):
    """By torch.func, gradients of a shared bias among them."""
    tensors = harness.inputs(SINGLE, device, scales=("bias", "relative_bias"))
    q = torch.stack([tensors["q"], 2 * tensors["q"]])

    def loss(q: Tensor, bias: Tensor, table: Tensor) -> Tensor:
        options = {"relative_bias": table, "causal": True, "backend": "triton"}
        return tritonattn.attention(q, tensors["k"], tensors["v"], bias=bias, **options).square().sum()

    gradients = torch.func.grad(loss, argnums=(0, 1, 2))
    leaves = tensors["bias"], tensors["relative_bias"]
    mapped = torch.func.vmap(gradients, in_dims=(0, None, None))(q, *leaves)
    for ours, theirs in zip(mapped, zip(*(gradients(one, *leaves) for one in q), strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs))


def test_the_kernel_in_gluon_takes_no_biases_of_pairs():
    plain, target = Problem(64, 64, torch.bfloat16, softcap=True, key_bias=True), Target.parse("sm_90")
    assert gluon_config(plain, target) is not None
    for field in ("bias", "relative_bias", "bias_after_softcap"):
        assert gluon_config(replace(plain, **{field: True}), target) is None, field
