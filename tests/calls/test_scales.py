"""Scales at their edges: sharp softmaxes in 16 bits, 16-bit scales, sums of gradients, rows without keys."""

import pytest
import torch

import tritonattn
from tests.support.bound import assert_within_bound
from tests.support.calls import assert_gradients_of_keys_add_up


def _operands(dtype: torch.dtype, kv_heads: int, spread: float) -> tuple[torch.Tensor, ...]:
    """q, k, v and a gradient of the output; logits under 1 / sqrt(D) have a standard deviation of `spread`."""
    random = torch.Generator().manual_seed(0)
    size = spread**0.5
    shapes = ((2, 4, 48, 16), (2, kv_heads, 48, 16), (2, kv_heads, 48, 16), (2, 4, 48, 16))
    return tuple(
        (torch.randn(shape, generator=random) * factor).to(dtype)
        for shape, factor in zip(shapes, (size, size, 1, 1), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spread", [1.0, 4.0, 9.0])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("mask", [{"causal": True}, {"window": (40, 0)}], ids=["fused", "blockwise"])
def test_gradients_of_sharp_softmaxes_in_16_bit(mask, kv_heads, spread, dtype):
    q, k, v, d_out = _operands(dtype, kv_heads, spread)

    def run(backend, cast):
        leaves = [cast(x).detach().requires_grad_() for x in (q, k, v, torch.ones(4, 1))]
        out = tritonattn.attention(*leaves[:3], gain=leaves[3], backend=backend, **mask)
        return torch.autograd.grad(out, leaves, cast(d_out))

    exact, eager = run("reference", torch.Tensor.double), run("reference", lambda x: x)
    for name, *gradients in zip(("q", "k", "v", "gain"), run("sdpa", lambda x: x), exact, eager, strict=True):
        assert_within_bound(*gradients, dtype, name=name)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_scales_in_16_bit_act_in_fp32(backend):
    q, k, v, _ = _operands(torch.float32, 4, 9.0)
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
