"""Softcap, sinks, dropout and statistics of the softmax out of the kernels; gradients of parts of the keys add up."""

import pytest
import torch

import tritonattn
from tests.kernels import harness
from tests.kernels.harness import FORMS, of_form
from tests.support.caches import sequences
from tritonattn.core.call import AttentionCall, RowGradients
from tritonattn.core.dropout import Dropout
from tritonattn.core.terms import Needs, Terms
from tritonattn.core.visibility import Visibility
from tritonattn.ops.passes import backward_pass, forward_pass

pytestmark = pytest.mark.usefixtures("small_tiles")
Q_LEN, K_LEN = 21, 35


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form, device):
    tensors, arguments = of_form(form, torch.float32, device, scales=("relative_bias",) if form == "after" else ())
    harness.check(tensors, **arguments)


def test_the_gradient_of_lse_in_16_bit(device):
    """There nothing corrects a wrong delta."""
    tensors, arguments = of_form("aux", torch.float16, device, scales=("query_scale",))
    harness.check(tensors, causal=True, **arguments)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # the interpreter's, where tanh is 1
@pytest.mark.parametrize("softcap", [0.01, 1e4])
def test_a_softcap_far_below_and_far_above_the_logits(softcap, device):
    tensors = harness.inputs(torch.float32, device, batch=1)
    harness.check(tensors, softcap=softcap, causal=True, return_aux=True)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # the interpreter's, where tanh is 1
def test_the_gradient_of_a_scale_whose_logits_are_capped(device):
    """Small, since tanh is flat: the rounding of out, times the mean of logits without their slopes, would pass it."""
    tensors = harness.inputs(torch.float16, device, scales=("query_scale",), batch=1)
    tensors["query_scale"] = tensors["query_scale"].abs() + 1
    harness.check(tensors, scale=2.0, softcap=1.5)


@pytest.mark.parametrize(("size", "aux"), [(-1e3, True), (50.0, True), (1e3, False)])
def test_a_sink_far_below_and_far_above_the_logits(size, aux, device):
    tensors = harness.inputs(torch.float32, device, batch=1, group=3)
    tensors["sinks"] = torch.tensor([size, 0.0, -torch.inf], device=device)
    harness.check(tensors, causal=True, return_aux=aux)


@pytest.mark.parametrize("size", [5.0, 14.0, 25.0])
def test_the_gradient_of_lse_with_a_sink_above_the_logits(size, device):
    """lse is without the sink, whose probability leaves the keys almost none of the row's."""
    tensors = harness.inputs(torch.float32, device, batch=1, scales=("gain",))
    tensors["sinks"] = torch.full((2,), size, device=device)
    harness.check(tensors, tritonattn.attention, causal=True, return_aux=True)


def test_the_statistics_of_rows_without_keys(device):
    tensors = harness.inputs(torch.float32, device, q_len=30, k_len=20, batch=1, scales=("sinks",))
    out, aux = tritonattn.scaled_attention(**tensors, causal=True, softcap=2.0, return_aux=True, backend="triton")
    for x, nothing in ((out, 0.0), (aux.lse, -torch.inf), (aux.max_logit, -torch.inf), (aux.entropy, 0.0)):
        assert (x[:, :, :10] == nothing).all()
        assert x[:, :, 10:].isfinite().all()


def _probabilities(k_len: int, device: torch.device, seed: int, **arguments) -> torch.Tensor:
    """P after dropout, [2, 2, Sq, Sk], out of a kernel whose values are the unit vectors."""
    tensors = harness.inputs(torch.float32, device, q_len=Q_LEN, k_len=k_len, value_dim=k_len)
    tensors["v"] = torch.eye(k_len, device=device).expand_as(tensors["v"])
    torch.manual_seed(seed)
    return tritonattn.scaled_attention(**tensors, dropout_p=0.4, backend="triton", **arguments)


def test_the_kept_pairs_are_those_of_the_materialised_mask(device):
    kept = _probabilities(K_LEN, device, seed=7) != 0
    torch.manual_seed(7)
    wanted = Dropout.draw(0.4, device).tile((2, 2), slice(0, Q_LEN), slice(0, K_LEN))
    assert torch.equal(kept, wanted)
    assert 0.5 < kept.float().mean() < 0.7


@pytest.mark.parametrize("seed", [(2**63 - 1, 0), (-1, 2**31 - 2), (-(2**63), 5)])
def test_any_64_bits_are_a_seed(seed, device, monkeypatch):
    dropout = Dropout(0.4, torch.tensor(seed, device=device))
    monkeypatch.setattr(Dropout, "draw", lambda p, device: dropout)
    wanted = dropout.tile((2, 2), slice(0, Q_LEN), slice(0, K_LEN))
    assert torch.equal(_probabilities(K_LEN, device, seed=0) != 0, wanted)


ROWS, KEYS, CUT = 23, 50, 31
NEEDS = Needs(q=True, k=True, v=True, query_scale=True, key_scale=True, key_bias=True, sinks=True)


def call_of(operands, first: int, last: int, is_part: bool, backend: str) -> AttentionCall:
    """Causal rows and the keys first <= j < last."""
    q, k, v, query, key, bias, sinks = operands
    k, v, key, bias = k[:, :, first:last], v[:, :, first:last], key[..., first:last], bias[..., first:last]
    ends = (torch.arange(KEYS - ROWS, KEYS, device=q.device) + 1 - first).clamp(0, last - first)
    ranges = torch.stack([torch.zeros_like(ends), ends], -1).expand(q.shape[0], -1, -1)
    visible = Visibility.of(q, k, key_ranges=ranges.int().contiguous())
    terms = Terms(0.3, query, key, bias, sinks, softcap=4.0)
    return AttentionCall(q, k, v, visible, terms, is_part=is_part, backend=backend)


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.float16, 4e-3)], ids=str)
def test_parts_add_up_to_the_whole(backend, dtype, allowed, device):
    q, _, _ = sequences(dtype, heads=(2, 1), length=ROWS, dims=(16, 24), device=device)
    _, k, v = sequences(dtype, heads=(2, 1), length=KEYS, dims=(16, 24), device=device)
    query, key = torch.rand(2, 2, ROWS, device=device) + 0.5, torch.rand(2, 1, KEYS, device=device) + 0.5
    bias, sinks = torch.randn(2, 1, 2, KEYS, device=device), torch.randn(2, 2, ROWS, device=device)
    operands = q, k, v, query, key, bias, sinks
    d_out, d_lse = torch.randn(2, 2, ROWS, 24, device=device).to(dtype), torch.randn(2, 2, ROWS, device=device)
    exact = [x.double() for x in operands]
    whole = call_of(exact, 0, KEYS, False, "sdpa")
    out, lse, *_ = forward_pass(whole, False)
    wanted = backward_pass(whole, (out, lse, None), d_out.double(), RowGradients(d_lse.double()), NEEDS)

    out, lse, _, _, rounding = forward_pass(call_of(operands, 0, KEYS, False, backend), dtype.itemsize == 2)
    results = out, lse, rounding if rounding.numel() else None
    cuts = ((0, CUT), (CUT, KEYS))
    parts = [
        backward_pass(call_of(operands, *cut, True, backend), results, d_out, RowGradients(d_lse), NEEDS)
        for cut in cuts
    ]
    for name in ("q", "query_scale", "k", "v", "key_scale", "key_bias", "sinks"):
        of_parts = [getattr(part, name).double() for part in parts]
        axis = {"k": 2, "v": 2, "key_scale": 2, "key_bias": 3}.get(name)
        got = torch.cat(of_parts, axis) if axis else of_parts[0] if name == "sinks" else sum(of_parts)
        error = (got - getattr(wanted, name)).abs().max() / getattr(wanted, name).abs().max()
        assert error <= allowed, f"{name}: {error:.1e}"
