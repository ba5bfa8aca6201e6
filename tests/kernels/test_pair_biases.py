"""Biases of pairs, dense and by distance, before a softcap and behind it, against the reference in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import tritonattn
from tests.calls.test_distances import Near
from tests.kernels import harness
from tests.kernels.harness import Tensors
from tests.support.masks import MASKS, visible_pairs
from tests.support.packed import Packed
from tests.support.pages import paged_call
from tests.support.pairs import in_turn
from tritonattn.backends import triton as backend
from tritonattn.backends.triton import attention, grids, launch
from tritonattn.core.call import AttentionCall, RowGradients
from tritonattn.core.terms import Needs, Terms
from tritonattn.core.visibility import Visibility
from tritonattn.ops.passes import forward_pass
from tritonattn.tuning import Problem, Target
from tritonattn.tuning.defaults import gluon_config

HALF, SINGLE = torch.float16, torch.float32
SIZES = (2, 2, 21, 35)
POSITION = torch.arange(21) + 14  # of rows among the keys
SOFTCAPS = [{}, {"softcap": 1.5}, {"softcap": 1.5, "bias_after_softcap": True}]

pytestmark = [
    pytest.mark.usefixtures("small_tiles"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),  # the interpreter's, of NaN
]


def with_biases(
    tensors: Tensors, dtype: torch.dtype, dense: tuple[int, ...] | None, relative: tuple[int, ...] | None
) -> Tensors:
    """The tensors, a bias of shape `dense` and a relative one of shape `relative`, some -inf among them."""
    random, tensors = torch.Generator().manual_seed(3), dict(tensors)
    for name, shape in (("bias", dense), ("relative_bias", relative)):
        if shape is not None:
            bias = 2 * torch.randn(shape, generator=random)
            bias.view(-1)[::5] = -torch.inf
            tensors[name] = bias.to(tensors["q"].device, dtype)
    return tensors


def check(tensors: Tensors, mask: str, device: torch.device, attend=tritonattn.scaled_attention, **options: Any):
    """Hold all results and gradients under one of MASKS to the bound."""
    sizes = (*tensors["q"].shape[:3], tensors["k"].shape[2])
    harness.check(tensors, attend, return_aux=True, **harness.mask(mask, device, *sizes), **options)


@in_turn(
    mask=MASKS,
    form=["relative", "dense", "both", "row of tables"],
    dtype=[SINGLE, HALF, SINGLE],
    softcap=[None, (1.5, False), (1.5, True)],
    scales=[("query_scale",), ("query_scale", "key_scale"), ("query_scale", "key_bias", "sinks"), ()],
    heads=[(2, 1), (1, 2), (1, 3)],
)
def test_every_mask(mask, form, dtype, softcap, scales, heads, device):
    (kv_heads, group), q_heads = heads, heads[0] * heads[1]
    shapes = {
        "relative": (None, (2, q_heads, 21, 50)),
        "dense": ((2, q_heads, 21, 35), None),
        "both": ((1, q_heads, 21, 1), (2, 1, 1, 13)),
        "row of tables": (None, (1, q_heads, 1, 20)),
    }
    tensors = harness.inputs(dtype, device, kv_heads=kv_heads, group=group, scales=scales)
    options = {} if softcap is None else dict(zip(("softcap", "bias_after_softcap"), softcap, strict=True))
    options["relative_right"] = 7 if form != "dense" else 0
    check(with_biases(tensors, dtype, *shapes[form]), mask, device, scale=0.3, **options)


@in_turn(right=[2, 0, 2, 40], relative=[(1, 2, 1, 1), (2, 1, 21, 3), (1, 2, 21, 16), (1, 1, 1, 60)])
def test_extents_shorter_and_longer_than_the_keys(right, relative, device):
    tensors = with_biases(harness.inputs(SINGLE, device), SINGLE, None, relative)
    check(tensors, "full", device, relative_right=min(right, relative[3] - 1))


@in_turn(scaling=["key_norm_mean", Near()], mask=["causal", "window"], softcap=SOFTCAPS[::2])
def test_biases_of_a_call_and_of_its_mode(scaling, mask, softcap, device):
    tensors = with_biases(harness.inputs(SINGLE, device), SINGLE, (2, 2, 1, 35), (1, 2, 1, 9))
    check(tensors, mask, device, partial(tritonattn.attention, scaling=scaling), relative_right=3, **softcap)


@in_turn(mask=["causal", "ranges", "mask of heads"], after=[False, True])
def test_what_hidden_pairs_hold_is_not_read(mask, after, device):
    """NaN instead of any number there leaves all bits of results and gradients."""
    pairs = visible_pairs(SIZES, **MASKS[mask](*SIZES)).to(device)
    tensors = with_biases(harness.inputs(SINGLE, device), SINGLE, SIZES, (2, 2, 21, 55))
    tensors["relative_scale"] = tensors["relative_bias"].clamp(min=-1.0)
    entry = (POSITION[:, None] - torch.arange(35) + 20).to(device).expand(SIZES)  # all inside
    of_pairs = torch.zeros(2, 2, 21, 55, dtype=torch.bool, device=device).scatter(3, entry, pairs)
    options = {"softcap": 1.5, "bias_after_softcap": after, "relative_right": 20, "return_aux": True}
    found = []
    for hidden in (0.0, torch.nan):
        of_terms = {"bias": ~pairs, "relative_bias": ~of_pairs, "relative_scale": ~of_pairs}
        terms = {name: tensors[name].masked_fill(where, hidden) for name, where in of_terms.items()}
        found.append(harness.by_kernels(tensors | terms, **options, **harness.mask(mask, device)))
    harness.assert_same(*found)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["bias", "relative_bias"])
@pytest.mark.parametrize("softcap", SOFTCAPS[::2], ids=str)
def test_nan_and_infinity_are_in_the_rows_that_attend_to_them(name, value, softcap, device):
    tensors = with_biases(harness.inputs(SINGLE, device), SINGLE, SIZES, (2, 2, 21, 35))
    tensors[name][1, 0, 7, 9] = value
    out, aux = tritonattn.scaled_attention(**tensors, causal=True, **softcap, return_aux=True, backend="triton")
    nan = torch.zeros(2, 2, 21, dtype=torch.bool)
    nan[1, 0, 7] = True
    for result in (out, *aux):
        assert torch.equal(result.isnan().cpu(), nan[..., None].expand(result.shape) if result.dim() > 3 else nan)


@in_turn(value=[torch.nan, torch.inf, -torch.inf, torch.inf], softcap=SOFTCAPS)
def test_values_that_are_no_numbers_act_as_in_key_bias(value, softcap, device):
    """In results and gradients; -inf stands at all keys of a head, whose rows then have none."""
    tensors = harness.inputs(SINGLE, device, scales=("query_scale",))
    bias = torch.randn(2, 2, 35, generator=torch.Generator().manual_seed(0)).to(device)
    bias[1, 0, slice(None) if value == -torch.inf else 9] = value
    of_pairs, of_keys = (
        harness.by_kernels(tensors | given, causal=True, return_aux=True, **softcap)
        for given in ({"bias": bias[:, :, None]}, {"key_bias": bias})
    )
    is_capped = value == torch.inf and softcap == SOFTCAPS[1]
    assert of_pairs["out"][1, 0].isnan().any() == (value != -torch.inf and not is_capped)
    assert of_pairs["lse"][1, 0].isneginf().all() == (value == -torch.inf)
    of_keys["bias"] = of_keys.pop("key_bias")[:, :, None]
    for name, result in of_pairs.items():
        torch.testing.assert_close(result, of_keys[name], equal_nan=True)


def test_gradients_of_shared_entries_have_the_same_bits_each_time(device):
    """Sums over rows, heads and batch entries, in one order."""
    tensors = with_biases(harness.inputs(HALF, device), HALF, (1, 1, 21, 1), (1, 1, 1, 20))
    first, *others = (harness.by_kernels(tensors, causal=True, return_aux=True) for _ in range(3))
    assert first["bias"].any()
    assert first["relative_bias"].any()
    for other in others:
        harness.assert_same(other, first)


def call_of(tensors: Tensors, visibility: Visibility, **options: Any) -> AttentionCall:
    terms = {name: x for name, x in tensors.items() if name not in "qkv"}
    return AttentionCall(*(tensors[name] for name in "qkv"), visibility, Terms(0.3, **terms, **options))


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16])
def test_biases_of_16_bits_are_read_as_such(dtype):
    """No copy in another dtype is made for a launch."""
    tensors = with_biases(harness.inputs(dtype, torch.device("cpu")), dtype, SIZES, (1, 2, 1, 20))
    call = call_of(tensors, Visibility.of(tensors["q"], tensors["k"], causal=True))
    with launch.recording(Target.parse("sm_90")) as launches:
        out, lse, *_ = backend.forward(call, True)
        backend.backward(call, out, lse, out, RowGradients(lse), Needs(*(x is not None for x in call.tensors())))
        backend.decode(call.changed(visibility=replace(call.visibility, at_lengths=True)), True)
    read = [one.arguments["terms"] for one in launches if "terms" in one.arguments]
    assert len(read) == 4
    for terms, name in ((one, name) for one in read for name in ("bias", "relative_bias")):
        assert getattr(terms, name).ptr is tensors[name]


@in_turn(mask=["full", "causal"], after=[False, True])
def test_packed_sequences(mask, after, device):
    """A row's distances are those of its sequence; tables of rows are in the packed axis."""
    packed = Packed((3, 18, 5, 1, 0), (20, 18, 2, 6, 3), q_tail=2, k_tail=3)
    tensors = harness.packed_inputs(packed, SINGLE, device, kv_heads=2)
    tensors["relative_bias"] = torch.randn(4, packed.q_len, 9, generator=torch.Generator().manual_seed(3)).to(device)
    options = {"relative_right": 4, "softcap": 1.5, "bias_after_softcap": after, "return_aux": True}
    attend = partial(tritonattn.attention_varlen, **packed.arguments(device))
    harness.check(tensors, attend, causal=mask == "causal", **options)


def test_pages(device):
    """The bits of the same call over packed keys."""
    rows = Packed((1, 18, 0, 3), (20, 18, 5, 40), q_tail=2, k_tail=3)
    table = torch.randn(1, 2, rows.q_len, 30, generator=torch.Generator().manual_seed(2)).to(device)
    calls = paged_call(rows, SINGLE, 16, causal=True, device=device)
    found, expected = (
        backend.forward(call.changed(terms=call.terms._replace(relative_bias=table, relative_right=3)), aux=True)
        for call in calls
    )
    assert all(map(torch.equal, found, expected))


def assert_close_to_torch(found: tuple[Tensor, ...], call: AttentionCall) -> None:
    """Results of a call without pages, which has no gradients, are those of the tiles of torch in float64."""
    terms = {name: x.double() for name, x in call.terms._asdict().items() if isinstance(x, Tensor)}
    q, k, v = (x.double() for x in (call.q, call.k, call.v))
    logits = call.terms._replace(**terms)
    exact = forward_pass(call.changed(q=q, k=k, v=v, terms=logits, aux=True, backend="sdpa"), False)
    error = 1e-5 if call.q.dtype == SINGLE else 4e-3
    for ours, other in zip(found, exact[:4], strict=True):
        torch.testing.assert_close(ours.double(), other.double(), rtol=error, atol=error)


@in_turn(
    lengths=[(60, 150), (5, 150), (171, 16)],
    counts=[None, (2, 3), (0, 1)],
    left=[None, 70, 20],
    softcap=SOFTCAPS,
    tables=[(2, 4, 3, 200), (1, 4, 1, 40), (1, 1, 3, 171)],
    right=[2, 0, 9],
    dtype=[SINGLE, HALF, SINGLE],
)
def test_decode(lengths, counts, left, softcap, tables, right, dtype, device):
    """Caches of several splits, in one piece and in pages: distances count from the end of each sequence's keys."""
    tensors = harness.inputs(dtype, device, kv_heads=2, group=2, q_len=3, k_len=176, scales=("query_scale",))
    tensors = with_biases(tensors, dtype, None, tables)
    given = None if counts is None else torch.tensor(counts, device=device)
    key_lengths = torch.tensor(lengths, device=device)
    visibility = Visibility.of_padded((2, 4, 2, 3, 176), device, key_lengths, given, left=left)
    call = call_of(tensors, visibility, relative_right=right, **softcap)
    found = backend.decode(call, aux=True)
    assert_close_to_torch(found, call)
    order = torch.randperm(22, generator=torch.Generator().manual_seed(0)).to(device)
    k, v = (torch.empty_like(x.reshape(2, 2, 11, 16, 16).transpose(1, 2).flatten(0, 1)) for x in (call.k, call.v))
    for pages, x in ((k, call.k), (v, call.v)):
        pages[order] = x.reshape(2, 2, 11, 16, 16).transpose(1, 2).flatten(0, 1)
    paged = backend.decode(call.changed(k=k, v=v, block_table=order.view(2, 11).int()), aux=True)
    assert all(map(torch.equal, paged, found))


@in_turn(q_len=[1, 3, 1], mask=["full", "causal", "lengths"], dense=[True, True, False])
def test_few_rows(q_len, mask, dense, device):
    """The decode kernel runs them, but not where a relative bias counts from other keys than the last visible one."""
    sizes = (2, 2, q_len, 150)
    tensors = with_biases(
        harness.inputs(SINGLE, device, q_len=q_len, k_len=150), SINGLE, sizes if dense else None, (1, 2, 1, 30)
    )
    call = call_of(tensors, Visibility.of(tensors["q"], tensors["k"], **harness.mask(mask, device, *sizes)))
    assert backend.are_few_rows(call) == (mask != "lengths")
    assert_close_to_torch((backend.decode if backend.are_few_rows(call) else backend.forward)(call, True), call)


@pytest.mark.parametrize("mask", ["causal", "window", "full"])
def test_splits(mask, device, monkeypatch):
    """Every pair has one writer where rows or keys are shared out among programs, too."""
    for name in ("splits_of_keys", "splits_of_rows"):
        monkeypatch.setattr(grids, name, lambda *sizes: 3)
    monkeypatch.setattr(attention, "_kept", attention._kept.__wrapped__)
    tensors = harness.inputs(SINGLE, device, batch=1, q_len=37, k_len=60)
    check(with_biases(tensors, SINGLE, (1, 2, 37, 60), (1, 2, 37, 20)), mask, device, relative_right=5)


@in_turn(mask=["causal", "window", "lengths", "mask"], after=[False, True])
def test_batch_invariant_rows(mask, after, device):
    tensors = with_biases(harness.inputs(SINGLE, device, scales=("query_scale",)), SINGLE, SIZES, (1, 2, 1, 30))
    options = {"softcap": 1.5, "bias_after_softcap": after, "relative_right": 5, "batch_invariant": True}
    check(tensors, mask, device, **options)


@pytest.mark.slow
def test_biases_with_dropout(device):
    tensors, arguments = harness.of_form("everything", HALF, device, scales=("query_scale", "bias", "relative_bias"))
    harness.check(tensors, relative_right=3, **arguments, **harness.mask("mask of heads", device))


def test_the_kernel_in_gluon_takes_no_biases_of_pairs():
    plain, target = Problem(64, 64, torch.bfloat16, softcap=True, key_bias=True), Target.parse("sm_90")
    assert gluon_config(plain, target) is not None
    for field in ("bias", "relative_bias", "bias_after_softcap"):
        assert gluon_config(replace(plain, **{field: True}), target) is None, field
