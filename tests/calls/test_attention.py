"""The public functions on a CPU: values and gradients against float64, backends, edges, aux, scales."""

import functools

import pytest
import torch
from torch import Tensor

import tritonattn
from tests.kernels import harness
from tests.support.calls import (
    TYPICAL,
    assert_extreme_sink,
    assert_extreme_sink_of_decode,
    assert_gradients_of_keys_add_up,
    operands,
)
from tests.support.masks import MASKS
from tests.support.pairs import pairwise
from tritonattn.backends import reference
from tritonattn.core.dropout import Dropout
from tritonattn.core.visibility import Visibility
from tritonattn.scaling import SCALINGS, Scales, Scaling


class _ReadsBoth(Scaling):
    """scale[i, j] = mean(q[i]^2) mean(k[j]^2), from q and k themselves."""

    def scales(self, q, k, visibility, statistics):
        return Scales(1.0, query=q.float().square().mean(-1), key=k.float().square().mean(-1))


def test_gradients_of_a_scaling_that_reads_q_and_k_itself_are_rounded_once():
    """Added in fp32 to those of the logits, and then rounded to 16 bits."""
    given = torch.randn(4, 1, 2, 21, 16).bfloat16()

    def gradients(dtype):
        *leaves, d_out = (x.to(dtype).requires_grad_() for x in given)
        out = tritonattn.attention(*leaves, scaling=_ReadsBoth(), causal=True)
        return torch.autograd.grad(out, leaves[:2], d_out)

    for ours, wanted in zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True):
        assert torch.equal(ours, wanted.bfloat16())


@pairwise(
    scaling=SCALINGS,
    mask=MASKS,
    dtype=[torch.float64, torch.float32, torch.bfloat16, torch.float16],
    heads=[(4, 2), (4, 1), (4, 4)],
)
def test_every_mode_under_every_mask(scaling, mask, dtype, heads):
    group = heads[0] // heads[1]
    sizes = {"kv_heads": heads[1], "group": group, "q_len": 5, "k_len": 7, "head_dim": 8, "value_dim": 6}
    tensors = harness.inputs(dtype, torch.device("cpu"), scales=("gain", "sinks"), **sizes)
    tensors["gain"][2] *= -1
    options = {"scaling": scaling, "backend": "sdpa", "return_aux": True}
    harness.check(tensors, tritonattn.attention, **options, **MASKS[mask](2, 4, 5, 7))


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize(
    "scaling",
    [0.25, 2, torch.rand(4, 1) - 0.5, torch.rand(1, 5), torch.rand(2, 1, 5), torch.rand(2, 4, 5), torch.tensor(0.3)],
)
def test_a_number_or_a_tensor_as_scaling(scaling, backend):
    leaves = operands()
    rows = torch.as_tensor(scaling, dtype=torch.float64)
    if isinstance(scaling, Tensor):
        scaling = leaves["scaling"] = rows.requires_grad_()
    ours = tritonattn.attention(**leaves | {"scaling": scaling}, causal=True, backend=backend)
    folded = leaves["q"] * rows.expand(2, 4, 5)[..., None]
    visibility = Visibility.of(folded, leaves["k"], causal=True)
    wanted = reference.attention(folded, leaves["k"], leaves["v"], 1.0, visibility).out
    torch.testing.assert_close(ours, wanted)
    gradients = (torch.autograd.grad(out.square().sum(), list(leaves.values())) for out in (ours, wanted))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_gain_multiplies_the_mode(backend):
    q, k, v = operands().values()
    for gain in (2.0, torch.full((4, 1), 2.0), torch.tensor(2.0)):
        ours = tritonattn.attention(q, k, v, scaling="key_norm_sum", gain=gain, causal=True, backend=backend)
        wanted = tritonattn.attention(2 * q, k, v, scaling="key_norm_sum", causal=True, backend=backend)
        torch.testing.assert_close(ours, wanted)


class Broken(Scaling):
    name = "broken"

    def __init__(self, result) -> None:
        self.result = result

    def scales(self, q, k, visibility, statistics):
        return self.result

    def multiplier(self, q, k, visible):
        return self.result


@pytest.mark.parametrize(
    ("backend", "result", "error", "message"),
    [
        ("sdpa", 0.5, TypeError, r"broken\.scales\(\): expected Scales, got float"),
        ("sdpa", Scales(torch.ones(())), TypeError, r"broken\.scales\(\)\.constant: expected a number"),
        ("sdpa", Scales(1.0, torch.ones(4)), ValueError, r"broken\.scales\(\)\.query: .*1-D \[4\]"),
        ("sdpa", Scales(1.0, key=torch.ones(4, 7)), ValueError, r"scales\(\)\.key: .*\[2, 2, 7\], got \[4, 7\]"),
        ("reference", torch.ones(4).long(), TypeError, r"multiplier\(\): expected a floating dtype, got torch.int64"),
        ("reference", torch.ones(1, 2, 2, 4, 4), ValueError, r"broadcastable to .* = \[2, 4, 5, 7\]"),
        ("reference", "x", TypeError, r"multiplier\(\): expected a number, got"),
        ("reference", torch.nan, ValueError, r"multiplier\(\): expected a finite number, got nan"),
    ],
)
def test_a_broken_scaling_of_a_user_is_named(backend, result, error, message):
    with pytest.raises(error, match=message):
        tritonattn.attention(*operands().values(), scaling=Broken(result), backend=backend)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_scaled_attention(backend):
    q, k, v = operands().values()
    query_scale, key_scale = torch.randn(2, 4, 5).double(), torch.randn(2, 2, 7).double()
    ours = tritonattn.scaled_attention(q, k, v, query_scale, key_scale, scale=0.5, causal=True, backend=backend)
    folded = (q * query_scale[..., None], k * key_scale[..., None], v)
    torch.testing.assert_close(ours, tritonattn.attention(*folded, scaling=0.5, causal=True))
    plain = tritonattn.scaled_attention(q, k, v, backend=backend)
    torch.testing.assert_close(plain, tritonattn.attention(q, k, v))
    one_head = tritonattn.scaled_attention(q, k, v, key_scale=key_scale[:, :1], backend=backend)
    torch.testing.assert_close(one_head, tritonattn.attention(q, k * key_scale[:, :1, :, None], v))
    rows = tritonattn.scaled_attention(q, k, v, key_scale=torch.tensor(2.0), backend=backend)
    torch.testing.assert_close(rows, tritonattn.attention(q, 2 * k, v))


def gradients_next_to_nan(leaves: dict[str, Tensor], fill: float, call) -> list[Tensor]:
    """out and gradients of `call` where rows without keys, d_out too, and keys of no row hold `fill`.

    They are one batch entry, and a row and two keys of the other.
    """
    blind = torch.zeros(2, 1, 5, dtype=torch.bool)
    blind[0], blind[1, :, 2] = True, True
    leaves = {name: x.detach().clone() for name, x in leaves.items()}
    for name in leaves.keys() - {"k", "v", "key_scale"}:
        leaves[name][blind.expand(2, 4, 5)] = fill
    for name in leaves.keys() & {"k", "v", "key_scale"}:
        leaves[name][0], leaves[name][1, :, [0, 6]] = fill, fill
    inputs = {name: x.requires_grad_() for name, x in leaves.items()}
    ranges = torch.where(blind[:, 0, :, None], 3, torch.tensor([1, 6])).int()
    out = call(**inputs, key_ranges=ranges)
    d_out = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    d_out[blind.expand(2, 4, 5)] = fill
    return [out, *torch.autograd.grad(out, list(inputs.values()), d_out.to(out.dtype))]


@pairwise(
    scaling=[*TYPICAL, "given"],
    backend=["sdpa", "reference"],
    dtype=[torch.float64, torch.bfloat16],
    fill=[torch.nan, torch.inf],
)
def test_rows_without_keys_and_keys_of_no_row_may_hold_anything(scaling, backend, dtype, fill):
    leaves = {name: x.to(dtype) for name, x in operands().items()}
    rows = torch.rand(2, 4, 5, dtype=torch.promote_types(dtype, torch.float32))
    if scaling == "given":
        call = functools.partial(tritonattn.scaled_attention, backend=backend)
        leaves |= {"query_scale": rows, "key_scale": torch.rand(2, 2, 7, dtype=rows.dtype)}
    else:
        call = functools.partial(tritonattn.attention, scaling=scaling, backend=backend)
        leaves["gain"] = rows
    clean, dirty = (gradients_next_to_nan(leaves, value, call) for value in (1.0, fill))
    for name, expected, found in zip(("out", *leaves), clean, dirty, strict=True):
        assert torch.equal(expected, found), name


SHAPES = {
    "batch": (0, (4, 2), (3, 5)),
    "queries": (2, (4, 2), (0, 5)),
    "keys": (2, (4, 2), (3, 0)),
    "queries and keys": (2, (4, 2), (0, 0)),
    "heads": (2, (0, 0), (3, 5)),
    "query heads": (2, (0, 2), (3, 5)),
}


@pairwise(scaling=TYPICAL, shape=SHAPES, backend=["auto", "triton", "sdpa", "reference"])
def test_nothing_to_compute(scaling, shape, backend):
    batch, heads, lengths = SHAPES[shape]
    leaves = operands(torch.float32, batch, heads, lengths)
    leaves["gain"] = torch.rand(heads[0], 1, requires_grad=True)
    asked = {"causal": True, "key_lengths": torch.zeros(batch).int()}
    if backend != "triton":  # which refuses them
        leaves["sinks"] = torch.rand(heads[0], requires_grad=True)
        asked |= {"return_aux": True, "mask": torch.ones(batch, heads[0], *lengths, dtype=torch.bool)}
    tensors = dict(leaves)
    q, k, v = (tensors.pop(name) for name in "qkv")
    result = tritonattn.attention(q, k, v, scaling=scaling, backend=backend, **asked, **tensors)
    out, aux = result if "return_aux" in asked else (result, None)
    assert out.shape == (batch, heads[0], lengths[0], 6)
    assert not out.any()
    if aux is not None:
        assert {x.shape for x in aux} == {out.shape[:3]}
        assert (aux.lse == -torch.inf).all()
    out.sum().backward()
    for name, x in leaves.items():
        assert x.grad is not None, name
        assert not x.grad.any(), name


def test_dropout_is_the_same_on_every_backend_and_follows_the_seed():
    q, k, v = operands().values()
    outs = []
    for backend in ("sdpa", "reference", "auto"):
        torch.manual_seed(5)
        outs.append(tritonattn.attention(q, k, v, causal=True, dropout_p=0.4, backend=backend))
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])
    again = tritonattn.attention(q, k, v, causal=True, dropout_p=0.4)
    assert not torch.allclose(again, outs[0])
    torch.manual_seed(5)
    dropout = Dropout.draw(0.4, q.device)
    visibility = Visibility.of(q, k, causal=True)
    torch.testing.assert_close(reference.attention(q, k, v, 8**-0.5, visibility, dropout=dropout).out, outs[0])


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("masks", [{"causal": True}, {"window": (2, 0)}])
def test_autocast_casts_as_torch_does(masks, backend, cast):
    leaves = operands(torch.float32, lengths=(7, 7))
    leaves["v"] = leaves["v"].detach().to(cast).requires_grad_()
    masks = masks | {"key_bias": torch.linspace(-1, 1, 7)[None]}
    with torch.autocast("cpu", dtype=cast):
        out = tritonattn.attention(*leaves.values(), scaling="key_norm_mean", backend=backend, **masks)
        like = torch.nn.functional.scaled_dot_product_attention(*leaves.values(), enable_gqa=True)
    gradients = torch.autograd.grad(out.float().sum(), leaves.values())
    assert out.dtype == like.dtype == cast
    assert [x.dtype for x in gradients] == [torch.float32, torch.float32, cast]
    by_hand = {name: x.detach().to(cast).requires_grad_() for name, x in leaves.items()}
    wanted = tritonattn.attention(*by_hand.values(), scaling="key_norm_mean", backend=backend, **masks)
    assert torch.equal(out, wanted)
    for ours, expected in zip(gradients, torch.autograd.grad(wanted.float().sum(), by_hand.values()), strict=True):
        assert torch.equal(ours, expected.to(ours.dtype))


def test_autocast_leaves_float64():
    leaves = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = tritonattn.attention(*leaves.values(), window=(2, 0))
    assert torch.equal(out, tritonattn.attention(*leaves.values(), window=(2, 0)))


@pytest.mark.parametrize("sink", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_sinks_that_are_not_finite(backend, sink):
    assert_extreme_sink(sink, backend)
    assert_extreme_sink_of_decode(sink, backend, keys=9)


OF_SINKS: dict[str, dict] = {  # key heads are shared; some rows attend to no key
    "fewer keys": {"causal": True},
    "ranges": {"key_ranges": torch.tensor([[1, 4], [0, 7], [5, 5], [2, 3], [0, 1]]).expand(2, 5, 2)},
    "mask": {"mask": (torch.arange(4 * 5 * 7) % 3 == 0).view(1, 4, 5, 7), "softcap": 2.0, "return_aux": True},
}


@pairwise(masks=OF_SINKS, backend=["sdpa", "reference"], batch_invariant=[False, True])
def test_a_sink_of_a_row_changes_that_row_alone(masks, backend, batch_invariant):
    q, k, v = operands(lengths=(5, 3 if masks == "fewer keys" else 7)).values()
    options = OF_SINKS[masks] | {"backend": backend, "batch_invariant": batch_invariant and backend == "sdpa"}

    def attend(sinks):
        found = tritonattn.attention(q, k, v, sinks=sinks, **options)
        return found if isinstance(found, Tensor) else found[0]

    sinks = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attend, sinks)
    out, moved = attend(sinks), sinks.detach().clone()
    moved[1, 2, 4] += 1
    differs = (attend(moved) != out).any(-1)
    assert differs[1, 2, 4]
    assert differs.sum() == 1
    of_heads = sinks[0, :, 0]
    for same in (of_heads[:, None], of_heads[:, None].expand(4, 5), of_heads[None, :, None]):
        assert torch.equal(attend(same), attend(of_heads))


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_scales_in_16_bit_act_in_fp32(backend):
    q, k, v = (x.detach() for x in operands(torch.float32, heads=(4, 4), lengths=(48, 48), dims=(16, 16)).values())
    q, k = 3 * q, 3 * k  # sharp rows
    random = torch.Generator().manual_seed(1)
    query_scale, key_scale = ((torch.rand(2, 4, 48, generator=random) + 0.5).bfloat16() for _ in range(2))
    found = tritonattn.scaled_attention(q, k, v, query_scale, key_scale, backend=backend)
    wide = (x.double() for x in (q, k, v, query_scale, key_scale))
    exact = tritonattn.scaled_attention(*wide, backend="reference")
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)
    gained = tritonattn.attention(q, k, v, scaling=query_scale, gain=key_scale, backend=backend)
    wide = [x.double() for x in (q, k, v, query_scale, key_scale)]
    exact = tritonattn.attention(*wide[:3], scaling=wide[3], gain=wide[4], backend="reference")
    torch.testing.assert_close(gained.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("softcap", [None, 1e3], ids=["fused", "blockwise"])
def test_gradients_of_keys_add_up_before_they_are_rounded(softcap, backend):
    assert_gradients_of_keys_add_up(backend, softcap=softcap)
