"""The blockwise path against the reference in fp64: every mask, option and gradient, across tile edges."""

import pytest
import torch

from tests.support.bound import assert_within_bound
from tests.support.calls import changed
from tests.support.masks import MASKS
from tests.support.pairs import in_turn, pairwise
from tests.support.watch import Watch
from tritonattn.backends import cpu as blockwise
from tritonattn.backends import reference
from tritonattn.backends.cpu import tiles
from tritonattn.core.call import AttentionCall, Gradients, Logits, Needs
from tritonattn.core.dropout import Dropout
from tritonattn.core.visibility import Visibility

ALL = Needs(*[True] * len(Needs._fields))
Q_LEN, K_LEN = 21, 29  # with `small_tiles` several tiles of each and a part of one
SIZES = {"batch": 2, "q_heads": 4, "kv_heads": 2, "q_len": Q_LEN, "k_len": K_LEN, "dim": 16, "value_dim": 8}
BOTH = {"heads": ("q_heads", "kv_heads"), "length": ("q_len", "k_len"), "width": ("dim", "value_dim")}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "dropout": {"p": 0.3},
    "all": {"softcap": 1.5, "sinks": True, "p": 0.3, "biased": True},
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 rows (over a group's heads) and 8 keys, two heads at a time."""
    monkeypatch.setattr(tiles, "_ROWS", 16)
    monkeypatch.setattr(tiles, "KEYS", 8)
    monkeypatch.setattr(tiles, "_PAIRS", 256)


def make_call(dtype=torch.float64, *, scaled=True, softcap=None, sinks=False, biased=False, p=0.0, scale=0.3, **given):
    """A call on random tensors; the scales have either sign and zeros, some biases are -inf.

    given   masks; sizes by the names of SIZES, or of BOTH for queries and keys alike
    """
    both = {name: given[word] for word, names in BOTH.items() if word in given for name in names}
    sizes = {name: given.get(name, both.get(name, size)) for name, size in SIZES.items()}
    masks = {name: x for name, x in given.items() if name not in SIZES and name not in BOTH}
    batch, q_heads, kv_heads, q_len, k_len, dim, value_dim = sizes.values()
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = (
        normal(batch, heads, length, width).to(dtype)
        for heads, length, width in ((q_heads, q_len, dim), (kv_heads, k_len, dim), (kv_heads, k_len, value_dim))
    )
    query_scale, key_scale = normal(batch, q_heads, q_len).to(wide), normal(batch, kv_heads, k_len).to(wide)
    query_scale[..., ::7], key_scale[..., ::5] = 0, 0
    shape = (batch, kv_heads, q_heads // max(kv_heads, 1), k_len)
    key_bias = normal(*shape).to(wide).masked_fill(normal(*shape) > 0.9, -torch.inf) if biased else None
    scales = (query_scale, key_scale) if scaled else (None, None)
    logits = Logits(scale, *scales, key_bias, softcap, normal(q_heads).to(wide) if sinks else None)
    dropout = Dropout(p, torch.tensor([7, 3])) if p else None
    return AttentionCall(q, k, v, Visibility.of(q, k, **masks), logits, dropout)


def output_gradients(call):
    """Random gradients of out and lse."""
    random = torch.Generator().manual_seed(1)
    shape = (*call.q.shape[:3], call.v.shape[3])
    d_out = torch.randn(shape, generator=random, dtype=torch.float64).to(call.q.dtype)
    d_lse = torch.randn(shape[:3], generator=random, dtype=torch.float64)
    return d_out, d_lse.to(torch.promote_types(call.q.dtype, torch.float32))


def run(call, d_out, d_lse, needs=ALL):
    rounding = torch.zeros_like(d_out, dtype=torch.int8) if call.q.dtype.itemsize == 2 else None
    result = blockwise.forward(call, True, rounding)
    return result, blockwise.backward(call, result.out, result.lse, d_out, d_lse, needs, rounding)


def run_reference(call, d_out, d_lse, dtype):
    """The reference in `dtype` and its gradients."""
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v, query_scale, key_scale, key_bias, sinks = leaves = Gradients(
        *(
            None if x is None else x.detach().to(dtype if i < 3 else wide).requires_grad_()
            for i, x in enumerate(call.tensors)
        )
    )
    factor = torch.tensor(call.logits.scale, dtype=wide)
    if query_scale is not None:
        factor = factor * query_scale[..., None]
    if key_scale is not None:
        factor = factor * key_scale.repeat_interleave(q.shape[1] // k.shape[1], 1)[..., None, :]
    options = {"softcap": call.logits.softcap, "sinks": sinks, "dropout": call.dropout}
    if key_bias is not None:
        options["bias"] = key_bias.flatten(1, 2)[:, :, None]
    result = reference.attention(q, k, v, factor, call.visibility, **options)
    outputs, gradients = [result.out, result.lse], [d_out.to(dtype), d_lse.to(wide)]
    present = [x for x in leaves if x is not None]
    found = iter(torch.autograd.grad(outputs, present, gradients))
    return result, Gradients(*(None if x is None else next(found) for x in leaves))


def check(call):
    """Every result and gradient within the bound."""
    dtype = call.q.dtype
    d_out, d_lse = output_gradients(call)
    exact, eager = (run_reference(call, d_out, d_lse, kind) for kind in (torch.float64, dtype))
    for fields, exact_fields, eager_fields in zip(run(call, d_out, d_lse), exact, eager, strict=True):
        for name, value in fields._asdict().items():
            wanted, low = getattr(exact_fields, name), getattr(eager_fields, name)
            assert (value is None) == (wanted is None), name
            if value is not None:
                assert value.dtype == low.dtype, name
                assert torch.equal(value.isinf(), wanted.isinf()), name
                finite = [torch.where(wanted.isinf(), 0, x) for x in (value, wanted, low)]
                assert_within_bound(*finite, dtype, name=name)


@pairwise(mask=MASKS, options=OPTIONS, dtype=DTYPES, kv_heads=[1, 2, 4], scaled=[True, False])
@pytest.mark.usefixtures("small_tiles")
def test_masks_options_and_dtypes(mask, options, dtype, kv_heads, scaled):
    check(make_call(dtype, kv_heads=kv_heads, scaled=scaled, **OPTIONS[options], **MASKS[mask](2, 4, Q_LEN, K_LEN)))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("root", "dim"), [(1, 128), (2, 128), (1, 64)])
def test_rows_of_few_keys(options, root, dim):
    """Sharp softmaxes, whose gradients are differences of what nearly cancels, in every head by itself."""
    sizes = {"batch": 1, "heads": 50, "length": 16, "width": dim}
    call = make_call(torch.float32, scaled=False, scale=1.0, causal=True, **sizes, **OPTIONS[options])
    counts = torch.arange(1.0, 17).pow(-1 / root).expand(1, 50, 16)
    call = changed(call, query_scale=counts)
    given = call, output_gradients(call)[0], torch.zeros(1, 50, 16)
    results = run(*given)[1], run_reference(*given, torch.float64)[1], run_reference(*given, torch.float32)[1]
    for name in ("q", "k", "v"):
        for values in zip(*(getattr(x, name).unbind(1) for x in results), strict=True):
            assert_within_bound(*values, torch.float32, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["ranges", "mask", "dropout"])
@pytest.mark.usefixtures("small_tiles")
def test_a_row_of_one_key_gives_its_query_what_lse_asks_for(form, dtype):
    """And no rounding, among rows that see the keys of several tiles."""
    lone = torch.arange(Q_LEN) % 3 == 1
    first = torch.where(lone, torch.arange(Q_LEN), 0)
    ranges = torch.stack([first, torch.where(lone, first + 1, K_LEN)], -1).expand(2, Q_LEN, 2)
    masks = {"key_ranges": ranges}
    if form == "mask":
        keys = torch.arange(K_LEN)
        masks = {"mask": ((ranges[..., :1] <= keys) & (keys < ranges[..., 1:]))[:, None]}
    call = make_call(dtype, p=0.3 if form == "dropout" else 0.0, **masks)
    d_out, d_lse = output_gradients(call)
    gradients = run(call, d_out, torch.zeros_like(d_lse))[1]
    for name in ("q", "query_scale"):
        gradient = getattr(gradients, name)
        assert gradient[:, :, lone].count_nonzero() == 0, name
        assert gradient[:, :, ~lone].count_nonzero() > 0, name
    check(call)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 130), (17, 37), (37, 17), (130, 130), (600, 1100)], ids=str)
def test_lengths(lengths):
    for mask in ["causal", "ranges"] if max(lengths) < 600 else ["causal lengths"]:
        check(make_call(torch.float32, batch=1, q_len=lengths[0], k_len=lengths[1], **MASKS[mask](1, 4, *lengths)))


@pytest.mark.parametrize(("dim", "value_dim"), [(1, 1), (3, 200), (96, 5), (256, 256)])
@pytest.mark.usefixtures("small_tiles")
def test_head_dims(dim, value_dim):
    check(make_call(torch.float32, dim=dim, value_dim=value_dim, scale=dim**-0.5, scaled=False, window=(9, 4)))


@in_turn(kv_heads=[1, 3, 24], pairs=[1, 1 << 10, 1 << 30, 1])
def test_heads_and_batch_entries_in_any_parts(kv_heads, pairs, monkeypatch):
    monkeypatch.setattr(tiles, "_ROWS", 16)
    monkeypatch.setattr(tiles, "KEYS", 8)
    monkeypatch.setattr(tiles, "_PAIRS", pairs)
    check(make_call(batch=3, q_heads=24, kv_heads=kv_heads, q_len=9, k_len=11, **MASKS["everything"](3, 24, 9, 11)))


@pytest.mark.usefixtures("small_tiles")
def test_a_scale_of_zero_has_a_gradient():
    call = make_call(causal=True)
    zero = changed(call, query_scale=torch.zeros_like(call.logits.query_scale))
    assert run(zero, *output_gradients(zero))[1].query_scale.abs().max() > 0.1
    check(zero)


@pytest.mark.parametrize("sink", [-torch.inf, -200.0, 200.0])
@pytest.mark.usefixtures("small_tiles")
def test_extreme_sinks(sink):
    call = make_call(torch.float32, sinks=True, **MASKS["ranges"](2, 4, Q_LEN, K_LEN))
    call.logits.sinks[1] = sink
    check(call)


@pairwise(
    mask=["causal lengths", "causal ranges", "everything"],
    poison=[torch.nan, torch.inf, -torch.inf],
    options=["plain", "all"],
)
@pytest.mark.usefixtures("small_tiles")
def test_keys_hidden_from_every_row_reach_nothing(mask, poison, options):
    call = make_call(**OPTIONS[options], **MASKS[mask](2, 4, Q_LEN, K_LEN))
    visible = call.visibility.dense().expand(2, 4, Q_LEN, K_LEN)
    unseen = ~visible.unflatten(1, (2, 2)).any(3).any(2)  # [B, Hkv, Sk]
    blind = ~visible.any(-1)  # [B, Hq, Sq]
    assert unseen.any()
    assert blind.any() or mask == "causal lengths"
    d_out, d_lse = output_gradients(call)
    clean = run(call, d_out, d_lse)
    for tensor, hidden in ((call.k, unseen), (call.v, unseen), (call.q, blind), (d_out, blind)):
        tensor[hidden] = poison
    call.logits.key_scale[unseen], call.logits.query_scale[blind], d_lse[blind] = poison, poison, poison
    torch.testing.assert_close(sum(run(call, d_out, d_lse), ()), sum(clean, ()), rtol=0, atol=0)


@pytest.mark.usefixtures("small_tiles")
def test_only_what_is_needed_is_computed():
    call = make_call(**OPTIONS["all"], causal=True)
    d_out, d_lse = output_gradients(call)
    everything = run(call, d_out, d_lse)[1]
    for asked, wanted in everything._asdict().items():
        alone = run(call, d_out, d_lse, Needs(*(name == asked for name in Needs._fields)))[1]
        assert [name for name, gradient in alone._asdict().items() if gradient is not None] == [asked]
        assert torch.equal(getattr(alone, asked), wanted), asked


@pytest.mark.parametrize("mask", MASKS)
def test_where_values_cannot_be_read(mask, small_tiles, monkeypatch):
    monkeypatch.setattr(tiles, "readable", lambda device: False)
    check(make_call(**OPTIONS["all"], **MASKS[mask](2, 4, Q_LEN, K_LEN)))


@pytest.mark.parametrize("changed", [{"batch": 0}, {"q_len": 0}, {"k_len": 0}, {"heads": 0}, {"value_dim": 0}])
def test_empty_tensors(changed):
    call = make_call(**changed)
    result, gradients = run(call, output_gradients(call)[0], None)
    for tensor in (result.out, *gradients[:5]):
        assert (tensor == 0).all()


def test_keys_and_values_with_means(small_tiles):
    """An error of delta reaches d_q times the mean key, so delta must not come from an output of 16 bits."""
    call = make_call(dtype=torch.bfloat16, q_len=40, k_len=64, width=64, scaled=False)
    call = changed(call, k=call.k + 10, v=call.v + 10)
    check(call)


def packed(length, document):
    """Ranges of documents that lie one after the other."""
    start = torch.arange(length) // document * document
    return torch.stack([start, start + document], -1)[None].int()


LENGTH = 2048
LONG = {  # and the keys that a block of rows sees
    "window": ({"causal": True, "window": (256, None)}, 512),
    "lengths": ({"key_lengths": torch.tensor([500])}, 512),
    "ranges": ({"key_ranges": packed(LENGTH, 512)}, 512),
    "mask of keys": ({"mask": (torch.arange(LENGTH) < 200)[None, None, None]}, 256),
}


@pytest.mark.parametrize("mask", LONG)
def test_memory_grows_with_the_length_alone_and_tiles_that_nobody_sees_are_skipped(mask):
    masks, keys = LONG[mask]
    call = make_call(torch.float32, batch=1, q_heads=2, kv_heads=1, length=LENGTH, **masks)
    with Watch() as forward:
        result = blockwise.forward(call, True)
    with Watch() as backward:
        blockwise.backward(call, result.out, result.lse, *output_gradients(call), ALL, None)
    inputs = 4 * LENGTH * 2 * 16  # bytes of q
    assert max(forward.largest, backward.largest) <= max(4 * tiles._PAIRS, 3 * inputs)
    blocks = LENGTH // (tiles._ROWS // 2)
    assert forward.calls["aten::bmm"] <= blocks * (keys // tiles.KEYS)


@pytest.mark.usefixtures("small_tiles")
def test_inputs_stay_as_they_are_and_results_repeat():
    call = make_call(torch.float32, **OPTIONS["all"], **MASKS["everything"](2, 4, Q_LEN, K_LEN))
    d_out, d_lse = output_gradients(call)
    inputs = (*call.tensors, d_out, d_lse)
    before = [x.clone() for x in inputs]
    first, second = (sum(run(call, d_out, d_lse), ()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
