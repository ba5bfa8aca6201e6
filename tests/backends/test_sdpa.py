"""The path through PyTorch's attention: its results, gradients where its kernel is least exact, and its memory."""

import itertools

import pytest
import torch

import tritonattn
from tests.backends.test_cpu import make_call, output_gradients, run_reference
from tests.support.bound import BAND, PYTORCH_GRADIENT_BAND, assert_within_bound
from tests.support.calls import changed
from tests.support.masks import MASKS
from tests.support.pairs import in_turn, pairwise
from tests.support.watch import Watch
from tritonattn.backends.cpu import sdpa
from tritonattn.core.call import Gradients

FAST = "aten::_scaled_dot_product_flash_attention_for_cpu"


def leaves_of(call):
    tensors = Gradients(*call.tensors)._asdict()
    return {name: x.detach().requires_grad_() for name, x in tensors.items() if x is not None}


def run(call, d_out):
    """out and the gradients of q, k, v and the scales."""
    leaves = leaves_of(call)
    out = sdpa.attention(changed(call, **leaves))
    gradients = torch.autograd.grad(out, list(leaves.values()), d_out)
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def exact_and_eager(call, d_out, folded=False):
    """The reference in fp64 and in the call's dtype; `folded` rounds q * query_scale and k * key_scale."""
    d_lse = torch.zeros(call.q.shape[:3])
    results = []
    for dtype in (torch.float64, call.q.dtype):
        rounded = folded and dtype == call.q.dtype
        result, gradients = run_reference(_folded(call) if rounded else call, d_out, d_lse, dtype)
        found = {"out": result.out.detach(), **gradients._asdict()}
        if rounded:
            found |= _unfolded(call, gradients)
        results.append(found)
    return results


def _scaled(call):
    """(name, name of its scale, operand, scale) of q and k that have one."""
    named = (("q", "query_scale", call.q, call.logits.query_scale), ("k", "key_scale", call.k, call.logits.key_scale))
    return [one for one in named if one[3] is not None]


def _folded(call):
    folded = {name: (x * scale[..., None]).to(x.dtype) for name, _, x, scale in _scaled(call)}
    return changed(call, query_scale=None, key_scale=None, **folded)


def _unfolded(call, gradients):
    found = {}
    for name, name_of_scale, x, scale in _scaled(call):
        g = getattr(gradients, name)
        found |= {name: (g * scale[..., None]).to(x.dtype), name_of_scale: (g.float() * x.float()).sum(-1)}
    return found


def band_of(name):
    return BAND if name == "out" else PYTORCH_GRADIENT_BAND


def check(call):
    """Results and gradients within the bound; in bf16 the bound of eager attention on rounded operands."""
    assert sdpa.supports(call)
    d_out, folded = output_gradients(call)[0], call.q.dtype == torch.bfloat16
    exact, eager = exact_and_eager(call, d_out, folded)
    for name, result in run(call, d_out).items():
        assert_within_bound(result, exact[name], eager[name], call.q.dtype, name=name, band=band_of(name))


@pairwise(
    length=[17, 130, 530],
    kv_heads=[1, 2, 4],
    dtype=[torch.float64, torch.float32, torch.float16, torch.bfloat16],
    scaled=[False, True],
    causal=[False, True],
)
def test_is_the_reference(length, kv_heads, dtype, scaled, causal):
    scale = 0.25
    if scaled:  # in fp32 sharper rows are under the README's Limits
        scale = 0.05 if dtype == torch.float32 else 0.1
    check(make_call(dtype, kv_heads=kv_heads, length=length, scaled=scaled, scale=scale, causal=causal))


@pytest.mark.parametrize("q_len", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_lone_key(q_len, dtype):
    call = make_call(dtype, q_len=q_len, k_len=1)
    d_out = output_gradients(call)[0]
    results = run(call, d_out)
    assert torch.equal(results.pop("out"), call.v.repeat_interleave(2, 1).expand(-1, -1, q_len, -1))
    wanted = d_out.double().unflatten(1, (2, 2)).sum((2, 3))
    error = (results.pop("v")[:, :, 0].double() - wanted).abs().max()
    assert error <= 2 * torch.finfo(dtype).eps * wanted.abs().max()
    assert all(gradient.count_nonzero() == 0 for gradient in results.values())


@in_turn(
    head_dims=[(1, 1), (3, 16), (16, 3), (37, 37), (96, 64), (64, 128), (200, 256), (256, 1)],
    dtype=[torch.float32, torch.float16, torch.bfloat16],
)
def test_head_dims(head_dims, dtype):
    dim, value_dim = head_dims
    check(make_call(dtype, dim=dim, value_dim=value_dim, scaled=False, scale=dim**-0.5, length=70, causal=True))


@pytest.mark.parametrize("scale", [0.0, -0.7])
@pytest.mark.parametrize("causal", [False, True])
def test_zero_and_negative_constants(scale, causal):
    check(make_call(torch.float32, length=45, scale=scale, causal=causal))


def test_a_scale_of_zero_has_a_gradient():
    call = make_call(torch.float32, length=37, causal=True)
    call.logits.query_scale.zero_()
    assert run(call, output_gradients(call)[0])["query_scale"].abs().max() > 0.1
    check(call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_of_one_key_has_no_gradient_to_its_logit(dtype):
    call = make_call(dtype, length=37, causal=True)
    call.logits.query_scale[..., 0] = 3
    found = run(call, output_gradients(call)[0])
    for name in ("q", "query_scale"):
        assert found[name][:, :, 0].count_nonzero() == 0, name
        assert found[name][:, :, 1:].count_nonzero() > 0, name
    values = call.v[:, :, 0].repeat_interleave(2, dim=1)  # of each query head
    torch.testing.assert_close(found["out"][:, :, 0], values, rtol=0, atol=0)


def test_tiny_scales_keep_their_digits_in_fp16():
    call = make_call(torch.float16, length=64, scale=1.0, causal=True)
    call = changed(call, query_scale=call.logits.query_scale * 1e-5, key_scale=None)
    d_out = output_gradients(call)[0]
    exact, _ = exact_and_eager(call, d_out)
    error = (run(call, d_out)["query_scale"].double() - exact["query_scale"]).abs().max()
    assert error <= 2e-3 * exact["query_scale"].abs().max()
    check(call)


def test_large_scales_of_small_keys_do_not_overflow_in_fp16():
    """q * query_scale would be infinite although no logit is large."""
    call = make_call(torch.float16, length=64, scale=0.1, causal=True)
    call = changed(call, k=call.k * 1e-4, query_scale=call.logits.query_scale * 1e5, key_scale=None)
    exact, eager = exact_and_eager(call, output_gradients(call)[0])
    assert_within_bound(sdpa.attention(call), exact["out"], eager["out"], torch.float16)


CAUSAL = {"causal": True}
SHOWN_BY_SHAPES = [((9, 9), {}), ((9, 12), {}), ((9, 9), CAUSAL), ((1, 12), CAUSAL)]
SHOWN_BY_SHAPES += [((1, 12), {"window": (11, 0)}), ((9, 12), {"window": (11, 8)})]
HIDDEN_BY_SHAPES = [((9, 12), CAUSAL), ((12, 9), CAUSAL), ((9, 9), {**CAUSAL, "window": (8, None)})]
HIDDEN_BY_SHAPES += [((1, 12), {"window": (10, 0)}), ((9, 12), {"window": (11, 7)}), ((9, 9), {"window": (0, 8)})]


@pytest.mark.parametrize(("lengths", "masks"), SHOWN_BY_SHAPES, ids=str)
def test_supports_what_shapes_tell(lengths, masks):
    check(make_call(q_len=lengths[0], k_len=lengths[1], **masks))


def test_supports_nothing_else():
    """Neither rows that see some keys alone, nor masks of values, nor extras, nor empty tensors."""
    hiding = [mask(2, 4, 37, 37) for name, mask in MASKS.items() if name not in ("full", "causal")]
    others = [{"length": 37, **masks} for masks in hiding]
    others += [{"q_len": q_len, "k_len": k_len, **masks} for (q_len, k_len), masks in HIDDEN_BY_SHAPES]
    others += [{"softcap": 2.0}, {"sinks": True}, {"p": 0.1}, {"k_len": 0}, {"batch": 0}]
    assert [given for given in others if sdpa.supports(make_call(**given))] == []


@pairwise(length=[1, 2, 15, 16, 17], causal=[False, True], dtype=[torch.float32, torch.bfloat16, torch.float64])
def test_nan_that_a_row_sees_is_in_its_results(length, causal, dtype):
    """With fewer than 16 keys PyTorch's own kernel returns 0 or stale memory."""
    visible = torch.ones(length, length, dtype=torch.bool).tril(0 if causal else length)
    for name, place, learns in itertools.product(("q", "k", "gain"), {0, length // 2, length - 1}, (False, True)):
        q, k, v = torch.randn(3, 1, 2, length, 8).to(dtype).unbind(0)
        operands = {"q": q.clone(), "k": k.clone(), "v": v.clone()}
        operands["gain"] = torch.ones(1, 2, length, dtype=torch.promote_types(dtype, torch.float32))
        operands[name][:, :, place] = torch.nan
        leaves = {key: x.requires_grad_(learns) for key, x in operands.items()}
        out = tritonattn.attention(**leaves, scaling="key_count", causal=causal)
        touched = visible[:, place] if name == "k" else torch.arange(length) == place
        assert torch.equal(out.isnan(), touched[:, None].expand_as(out)), (name, place, learns)
        aux = tritonattn.attention(**leaves, scaling="key_count", causal=causal, return_aux=True)[1]
        assert all(torch.equal(x.isnan(), touched.expand_as(x)) for x in aux), (name, place, learns)


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
    dim, value_dim = head_dims
    call = make_call(dtype, kv_heads=kv_heads, length=512, dim=dim, value_dim=value_dim, causal=True)
    q, k, v = (LAYOUTS[layout](x) for x in (call.q, call.k, call.v))
    call = changed(call, q=q, k=k, v=v)
    with Watch() as watch:
        run(call, output_gradients(call)[0])
    assert watch.calls[FAST] == watch.calls[FAST + "_backward"] == 1
    assert watch.largest <= 2 * 8 * 2 * 4 * 512 * 16  # twice q in fp64: a sixteenth of the 512 * 512 pairs


@pairwise(scaled=[False, True], length=[2, 40], dtype=[torch.float32, torch.bfloat16])
def test_a_row_of_one_key_leaves_no_rounding_in_gradients(scaled, length, dtype):
    """Its logit has the gradient 0; with two tokens a rounding of it can exceed all other gradients of the key."""
    sizes = {"heads": 16, "length": length, "width": 64}
    call = make_call(dtype, **sizes, scaled=False, scale=0.125, causal=True)
    if scaled:
        call = changed(call, query_scale=torch.arange(length, 0, -1.0).expand(2, 16, length) / length)
    d_out = output_gradients(call)[0]
    first = torch.arange(length)[:, None] == 0
    found, without = (run(changed(call, q=q), d_out) for q in (call.q, call.q.masked_fill(first, 0)))
    assert found["q"][:, :, 0].count_nonzero() == 0
    assert found["k"].count_nonzero() > 0
    assert torch.equal(found["k"], without["k"])
    check(call)


@in_turn(
    dtype=[torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16],
    means=[(10, 0), (10, 0), (10, 10), (100, 100)],
    scale=[0.125, 0.125, 1 / 256, 0.125, 0.125, 1 / 256, 0.125, 0.125],
    masks=[{"causal": True}, {}, {}, {"causal": True}, {}, {}, {}, {}],
)
def test_keys_and_values_with_means(dtype, scale, masks, means):
    """The error of delta, taken from a rounded output, reaches d_q and d_k times the mean key: each head by itself."""
    call = make_call(dtype, length=256, width=64, scaled=False, scale=scale, **masks)
    call = changed(call, k=call.k + means[0], v=call.v + means[1])
    d_out = output_gradients(call)[0]
    results = run(call, d_out), *exact_and_eager(call, d_out)
    for name in ("out", "q", "k", "v"):
        for values in zip(*(x[name].unflatten(1, (2, -1)).flatten(0, 1) for x in results), strict=True):
            assert_within_bound(*values, dtype, name=name, band=band_of(name))


def test_gradients_summed_over_many_rows():
    """By PyTorch's kernel, in 16 bits, they are 1.5 times the bound off."""
    sizes = {"batch": 1, "heads": 2, "length": 550, "width": 16}
    check(make_call(torch.float16, **sizes, scaled=False, scale=0.25, causal=True))
