"""The tangent of a call and that tangent's gradient, by tiles, against torch's derivatives of the dense reference."""

import pytest
import torch

from tests.support.bound import assert_within_bound
from tests.support.calls import CALLS, changed, example
from tests.support.derivatives import by_autograd, by_passes, directions, in_dtype, tensors_of
from tests.support.masks import MASKS
from tests.support.pairs import in_turn, pairwise
from tests.support.watch import Watch
from tritonattn.backends.cpu import Sdpa, by_parts, tiles
from tritonattn.backends.protocol import SecondOrder
from tritonattn.core.call import AttentionCall
from tritonattn.core.terms import AXES, Gradients, Needs, Terms
from tritonattn.core.visibility import Visibility

EVERYTHING = {"sinks": True, "bias": True, "softcap": 2.0, "pairs": (2, 4), "distances": True, "dropout": True}
SDPA, QKV = Sdpa(), Needs(q=True, k=True, v=True)
SIZES = (2, 4, 5, 7)  # B, Hq, Sq, Sk of `example`

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script")  # of torch's derivatives


@pytest.fixture(autouse=True)
def _leave_pytorchs_kernel_out(monkeypatch):
    monkeypatch.setattr(by_parts, "takes", lambda call: False)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 8 rows (over a group's heads) and 4 keys, a head or two at a time."""
    monkeypatch.setattr(tiles, "_ROWS", 8)
    monkeypatch.setattr(tiles, "KEYS", 4)
    monkeypatch.setattr(tiles, "_PAIRS", 32)


def check(call, tangents=None, dtype=torch.float64, with_lse=True):
    call = in_dtype(call, dtype)
    given, d_out, d_lse = directions(call)
    tangents, d_lse = given if tangents is None else tangents, d_lse if with_lse else None
    ours = by_passes(call, tangents, d_out, d_lse)
    exact, eager = (by_autograd(call, tangents, d_out, d_lse, one) for one in (torch.float64, dtype))
    assert ours.keys() == exact.keys()
    for name, result in ours.items():
        assert_within_bound(result, exact[name], eager[name], dtype, name=name)
        assert result.dtype == eager[name].dtype, name


@pairwise(
    case=[*CALLS, "everything"],
    dtype=[torch.float64, torch.float32, torch.bfloat16],
    step=["one tile", "tiles", "tiles not read"],
    with_lse=[True, False],
)
def test_every_term(case, dtype, step, with_lse, request, monkeypatch):
    if step != "one tile":
        request.getfixturevalue("small_tiles")
    if step == "tiles not read":
        monkeypatch.setattr(tiles, "readable", lambda device: False)
    check(example(**CALLS.get(case, EVERYTHING)), dtype=dtype, with_lse=with_lse)


@pairwise(mask=MASKS, form=["scales", "everything"], values=["read", "not read"])
@pytest.mark.usefixtures("small_tiles")
def test_every_mask(mask, form, values, monkeypatch):
    if values == "not read":
        monkeypatch.setattr(tiles, "readable", lambda device: False)
    check(example(**(EVERYTHING if form == "everything" else {}), **MASKS[mask](*SIZES)))


# Calls that have every tensor between them, and each with softcaps and without.
OF_TENSORS = {
    "every tensor": EVERYTHING,
    "after the softcap": {"pairs": (1, 1), "bias": True, "softcap": 2.0},
    "no softcap": {"bias": True, "sinks": True, "pairs": (2, 4), "distances": True},
}


def of_tensors(case):
    return in_dtype(example(**{"causal": True, **OF_TENSORS[case], "dropout": False}), torch.float64)


@pytest.mark.parametrize("name", AXES)
@pytest.mark.usefixtures("small_tiles")
def test_a_tangent_that_is_not_there_is_zero(name):
    """One alone, and all but one."""
    cases = [call for call in map(of_tensors, OF_TENSORS) if name in tensors_of(call)]
    every, *_ = directions(cases[-1])
    check(cases[-1], Gradients(**{name: getattr(every, name)}))
    every, *_ = directions(cases[0])
    check(cases[0], every._replace(**{name: None}))


@pytest.mark.parametrize("case", OF_TENSORS)
@pytest.mark.usefixtures("small_tiles")
def test_a_gradient_that_is_asked_for_alone_is_the_same(case):
    call = of_tensors(case)
    tangents, d_out, d_lse = directions(call)
    every, saved = by_passes(call, tangents, d_out, d_lse), (call.v, SDPA.forward(call).lse, None)
    for name in tensors_of(call):
        alone = Needs(**{name: True})
        found = SDPA.second(call, saved, SecondOrder(tangents, d_out, d_lse, alone, Needs()))[0]._asdict()
        of_tangent = SDPA.second(call, saved, SecondOrder(tangents, d_out, d_lse, Needs(), alone))[1]._asdict()
        assert torch.equal(found.pop(name), every[name])
        assert torch.equal(of_tangent.pop(name), every[f"dot {name}"])
        assert not any(x is not None for x in (*found.values(), *of_tangent.values()))


@pytest.mark.parametrize("scale", [0.25, 3.0])
@pytest.mark.parametrize("length", [16, 300])
def test_sharp_softmaxes(scale, length):
    """Sums that nearly cancel are held to the bound in every head by itself, in one tile and across tiles."""
    random = torch.Generator().manual_seed(0)
    q, k, v, query_scale = (torch.randn(1, 6, length, width, generator=random) for width in (32, 32, 16, 1))
    terms = Terms(scale, query_scale[..., 0], query_scale[..., 0].flip(2))
    call = AttentionCall(q, k, v, Visibility.of(q, k, causal=True), terms)
    given = directions(call)
    ours, exact, eager = by_passes(call, *given), by_autograd(call, *given), by_autograd(call, *given, torch.float32)
    for name, result in ours.items():
        for head, x in enumerate(result.unbind(1)):
            assert_within_bound(x, exact[name][:, head], eager[name][:, head], torch.float32, name=name)


@pytest.mark.usefixtures("small_tiles")
def test_rows_of_one_key_pass_on_the_tangent_of_its_value_and_no_rounding():
    bounds = torch.tensor([[1, 2], [0, 7], [5, 6], [6, 7], [0, 1]])
    call = in_dtype(example(key_ranges=bounds.expand(2, 5, 2).int()), torch.float32)
    tangents, d_out, _ = directions(call)
    found = by_passes(call, tangents, d_out, None)
    lone = torch.tensor([0, 2, 3, 4])
    value = tangents.v.repeat_interleave(2, 1)[:, :, bounds[lone, 0]]
    torch.testing.assert_close(found["out"][:, :, lone], value, rtol=0, atol=0)
    for name in ("q", "query_scale", "dot q", "dot query_scale"):
        assert found[name][:, :, lone].count_nonzero() == 0, name
        assert found[name][:, :, 1].count_nonzero() > 0, name
    one = by_passes(changed(call, visibility=call.visibility.of(call.q, call.k, window=(2, -2))), tangents, d_out, None)
    assert one["v"].count_nonzero() == 0


@pairwise(mask=["causal lengths", "causal ranges", "everything"], poison=[torch.nan, torch.inf], form=OF_TENSORS)
@pytest.mark.usefixtures("small_tiles")
def test_what_no_row_sees_reaches_nothing(mask, poison, form):
    call = example(**OF_TENSORS[form], **MASKS[mask](*SIZES))
    call, visible = in_dtype(call, torch.float64), call.visibility.dense().expand(SIZES)
    unseen, blind = ~visible.unflatten(1, (2, 2)).any(3).any(2), ~visible.any(-1)  # [B, Hkv, Sk], [B, Hq, Sq]
    assert unseen.any()
    assert blind.any() or mask == "causal lengths"
    tangents, d_out, d_lse = directions(call)
    clean = by_passes(call, tangents, d_out, d_lse)
    places = {"k": unseen, "v": unseen, "key_scale": unseen, "q": blind, "query_scale": blind, "sinks": blind}
    seen = visible if call.terms.bias is None else visible.double().sum_to_size(call.terms.bias.shape) > 0
    places |= {"bias": ~seen, "key_bias": unseen[:, :, None].expand(2, 2, 2, 7)}
    for name, hidden in places.items():
        if (x := getattr(tangents, name)) is not None:
            x[hidden] = poison
            tensors_of(call)[name][hidden] = poison
    d_out[blind] = d_lse[blind] = poison
    for name, x in by_passes(call, tangents, d_out, d_lse).items():
        assert torch.equal(x, clean[name]), name


@pytest.mark.parametrize("sink", [torch.inf, -torch.inf])
def test_sinks_without_end(sink):
    """-inf is no sink, and +inf leaves nothing to the keys."""
    call = changed(example(causal=True, sinks=True), sinks=torch.full((2, 4, 5), sink, dtype=torch.float64))
    given = directions(call)
    found = by_passes(call, *given)
    if sink > 0:
        assert found["out"].count_nonzero() == found["v"].count_nonzero() == 0
        return
    without = changed(call, sinks=None)
    expected = by_passes(without, given[0]._replace(sinks=None), *given[1:])
    assert found.pop("sinks").count_nonzero() == found.pop("dot sinks").count_nonzero() == 0
    torch.testing.assert_close(found, expected)


@in_turn(case=["everything", "packed sinks dropout"], dtype=[torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("small_tiles")
def test_inputs_stay_as_they_are_and_results_repeat(case, dtype):
    call = in_dtype(example(**CALLS.get(case, EVERYTHING)), dtype)
    tangents, d_out, d_lse = directions(call)
    before = {name: x.clone() for name, x in {**tensors_of(call), **tangents._asdict()}.items() if x is not None}
    first, again = (by_passes(call, tangents, d_out, d_lse) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, again[name]), name
    for name, x in {**tensors_of(call), **tangents._asdict()}.items():
        assert x is None or torch.equal(x, before[name]), name


@torch.no_grad()
def test_no_buffer_of_all_pairs_and_no_product_of_a_tangent_that_is_not_there():
    q, k, v, d_out = torch.randn(4, 1, 2, 2048, 16).unbind()
    call = AttentionCall(q, k, v, Visibility.of(q, k, causal=True, window=(256, None)), Terms(0.25))
    lse = SDPA.forward(call).lse
    seen = 2 * (2048 // tiles._ROWS) - 1  # tiles, of which the first block of rows has one alone, computed once
    of_all, of_query = directions(call)[0], Gradients(directions(call)[0].q)
    runs = {
        6 * seen: lambda: SDPA.tangent(call, (v, lse, None), of_all),
        4 * seen: lambda: SDPA.tangent(call, (v, lse, None), of_query),
        (5 + 13) * seen - 5: lambda: SDPA.second(call, (v, lse, None), SecondOrder(of_all, d_out, None, QKV, QKV)),
        (3 + 10) * seen - 3: lambda: SDPA.second(call, (v, lse, None), SecondOrder(of_query, d_out, None, QKV, QKV)),
    }
    for products, run in runs.items():
        with Watch() as watch:
            run()
        assert watch.largest <= 4 * tiles._PAIRS
        assert watch.calls["aten::bmm"] + watch.calls["aten::baddbmm_"] == products
