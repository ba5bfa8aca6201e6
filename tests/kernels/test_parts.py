"""Gradients of parts of the keys, from the lse and the output of all keys, add up to those of the whole."""

import pytest
import torch

from tests.support.caches import sequences
from tritonattn.core.call import AttentionCall, Logits, Needs
from tritonattn.core.visibility import Visibility
from tritonattn.ops.attend import backward_pass, forward_pass

pytestmark = pytest.mark.usefixtures("small_tiles")

ROWS, KEYS, CUT = 23, 50, 31
NEEDS = Needs(*[True] * len(Needs._fields))


def call_of(operands, first: int, last: int, is_part: bool, backend: str) -> AttentionCall:
    """Causal rows and the keys first <= j < last."""
    q, k, v, query, key, bias, sinks = operands
    k, v, key, bias = k[:, :, first:last], v[:, :, first:last], key[..., first:last], bias[..., first:last]
    ends = (torch.arange(KEYS - ROWS, KEYS, device=q.device) + 1 - first).clamp(0, last - first)
    ranges = torch.stack([torch.zeros_like(ends), ends], -1).expand(q.shape[0], -1, -1)
    visible = Visibility.of(q, k, key_ranges=ranges.int().contiguous())
    terms = Logits(0.3, query, key, bias, 4.0, sinks)
    return AttentionCall(q, k, v, visible, terms, is_part=is_part, backend=backend)


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.float16, 4e-3)], ids=str)
def test_parts_add_up_to_the_whole(backend, dtype, allowed, device):
    q, _, _ = sequences(dtype, heads=(2, 1), length=ROWS, dims=(16, 24), device=device)
    _, k, v = sequences(dtype, heads=(2, 1), length=KEYS, dims=(16, 24), device=device)
    query, key = torch.rand(2, 2, ROWS, device=device) + 0.5, torch.rand(2, 1, KEYS, device=device) + 0.5
    bias, sinks = torch.randn(2, 1, 2, KEYS, device=device), torch.tensor([0.3, 2.0], device=device)
    operands = q, k, v, query, key, bias, sinks
    d_out, d_lse = torch.randn(2, 2, ROWS, 24, device=device).to(dtype), torch.randn(2, 2, ROWS, device=device)
    exact = [x.double() for x in operands]
    whole = call_of(exact, 0, KEYS, False, "sdpa")
    out, lse, *_ = forward_pass(whole, False)
    wanted = backward_pass(whole, (out, lse, None), d_out.double(), d_lse.double(), NEEDS)

    out, lse, _, _, rounding = forward_pass(call_of(operands, 0, KEYS, False, backend), dtype.itemsize == 2)
    results = out, lse, rounding if rounding.numel() else None
    cuts = ((0, CUT), (CUT, KEYS))
    parts = [backward_pass(call_of(operands, *cut, True, backend), results, d_out, d_lse, NEEDS) for cut in cuts]
    for name in ("q", "query_scale", "k", "v", "key_scale", "key_bias", "sinks"):
        of_parts = [getattr(part, name).double() for part in parts]
        axis = {"k": 2, "v": 2, "key_scale": 2, "key_bias": 3}.get(name)
        got = torch.cat(of_parts, axis) if axis else of_parts[0] if name == "sinks" else sum(of_parts)
        error = (got - getattr(wanted, name)).abs().max() / getattr(wanted, name).abs().max()
        assert error <= allowed, f"{name}: {error:.1e}"
