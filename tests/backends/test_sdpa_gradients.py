"""The path through PyTorch's attention: gradients where its kernel alone is least exact."""

import itertools

import pytest
import torch

from tests.backends.test_cpu import make_call, output_gradients
from tests.backends.test_sdpa import band_of, check, exact_and_eager, run
from tests.support.bound import assert_within_bound
from tests.support.calls import changed
from tests.support.pairs import in_turn
from tritonattn.backends.cpu import sdpa


@pytest.mark.parametrize(("power", "dim"), [(-1.0, 128), (-0.5, 64)])
def test_rows_of_few_keys_in_every_head(power, dim):
    """Scaled by n ** power, they have the sharpest softmaxes."""
    call = make_call(torch.float32, batch=200, q_heads=2, kv_heads=1, length=40, width=dim, scale=1.0, causal=True)
    factor = torch.arange(1, 41).double().pow(power).float().expand(200, 2, 40)
    call = changed(call, query_scale=factor, key_scale=None)
    d_out = output_gradients(call)[0]
    exact, eager = exact_and_eager(call, d_out)
    found = run(call, d_out)
    for name in ("out", "q", "k", "v"):
        for entry in range(200):
            values = (results[name][entry] for results in (found, exact, eager))
            assert_within_bound(*values, torch.float32, name=name, band=band_of(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [2, 40])
@pytest.mark.parametrize("scaled", [False, True])
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
    exact, eager = exact_and_eager(call, d_out)
    found = run(call, d_out)
    for name in ("out", "q", "k", "v"):
        for head in itertools.product(range(2), range(2)):
            by_key_head = (x[name].unflatten(1, (2, -1))[head] for x in (found, exact, eager))
            assert_within_bound(*by_key_head, dtype, name=f"{name} of {head}", band=band_of(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("size", [1e3, 1e9])
def test_far_off_keys_that_a_row_cannot_see_move_nothing(size, name, dtype):
    """As right padding under causal: a mean of all of them would leave nothing but rounding of the others."""
    call = make_call(dtype, length=64, scaled=False, scale=0.25, causal=True)
    padded = getattr(call, name).clone()
    padded[:, :, 40:] = size * torch.randn(padded.shape[3])
    d_out = output_gradients(call)[0]
    d_out[:, :, 40:] = 0
    expected, found = run(call, d_out), run(changed(call, **{name: padded}), d_out)
    for result in ("out", "q", "k", "v"):
        torch.testing.assert_close(found[result][:, :, :40], expected[result][:, :, :40], msg=result)


def test_a_gradient_of_a_scale_under_autocast():
    call = make_call(torch.float32, length=37, causal=True)
    d_out = output_gradients(call)[0]
    expected = run(call, d_out)["query_scale"]
    scale = call.logits.query_scale.requires_grad_()
    out = sdpa.attention(call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        [found] = torch.autograd.grad(out, scale, d_out)
    torch.testing.assert_close(found, expected)


def test_gradients_summed_over_many_rows():
    """By PyTorch's kernel, in 16 bits, they are 1.5 times the bound off."""
    sizes = {"batch": 1, "heads": 2, "length": 550, "width": 16}
    check(make_call(torch.float16, **sizes, scaled=False, scale=0.25, causal=True))
