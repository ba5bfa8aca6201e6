"""Softcap, sinks, dropout and the statistics of the softmax out of the kernels, alone and together, under masks."""

from __future__ import annotations

import pytest
import torch

import tritonattn
from tests.kernels import harness
from tests.support.masks import MASKS
from tritonattn.core.dropout import Dropout

pytestmark = pytest.mark.usefixtures("small_tiles")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Q_LEN, K_LEN = 21, 35

FORMS: dict[str, dict] = {
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "dropout": {"dropout_p": 0.3},
    "aux": {"return_aux": True},
    "softcap aux": {"softcap": 1.5, "return_aux": True},
    "sinks dropout": {"sinks": True, "dropout_p": 0.3},
    "everything": {"softcap": 1.5, "sinks": True, "dropout_p": 0.3, "return_aux": True},
}


def case(
    form: str, dtype: torch.dtype, device: torch.device, *, scales: tuple[str, ...] = (), **sizes
) -> tuple[harness.Tensors, dict]:
    """The tensors and the arguments of a form."""
    arguments = dict(FORMS[form])
    if arguments.pop("sinks", False):
        scales = (*scales, "sinks")
    return harness.inputs(dtype, device, scales=scales, **{"q_len": Q_LEN, "k_len": K_LEN, **sizes}), arguments


def mask_of(name: str, device: torch.device, batch: int = 2, heads: int = 2, q_len=Q_LEN, k_len=K_LEN) -> dict:
    arguments = MASKS[name](batch, heads, q_len, k_len)
    return {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}


@pytest.mark.parametrize("mask", ["full", "causal lengths", "window", "ranges", "mask of heads"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_under_masks(form, mask, device):
    tensors, arguments = case(form, torch.float32, device, scales=("query_scale", "key_scale"))
    harness.check(tensors, scale=0.3, **arguments, **mask_of(mask, device))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("form", ["softcap aux", "sinks dropout", "everything"])
def test_in_16_bit(form, dtype, device):
    tensors, arguments = case(form, dtype, device, scales=("query_scale",))
    harness.check(tensors, causal=True, **arguments)


@pytest.mark.parametrize("form", ["softcap", "aux", "sinks dropout"])
def test_without_scales(form, device):
    tensors, arguments = case(form, torch.float32, device, batch=1)
    harness.check(tensors, causal=True, **arguments)


@pytest.mark.parametrize(("kv_heads", "group"), [(3, 1), (2, 3)])
def test_grouped_heads(kv_heads, group, device):
    tensors, arguments = case("everything", torch.float32, device, kv_heads=kv_heads, group=group, batch=1)
    harness.check(tensors, causal=True, **arguments)


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 17), (17, 2), (37, 1), (32, 48)])
def test_ragged_lengths(q_len, k_len, device):
    tensors, arguments = case("everything", torch.float32, device, batch=1, q_len=q_len, k_len=k_len)
    harness.check(tensors, causal=True, **arguments)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(17, 40), (192, 128), (256, 256)])
def test_head_dims(head_dim, value_dim, device):
    sizes = {"head_dim": head_dim, "value_dim": value_dim, "batch": 1, "q_len": 17, "k_len": 19}
    tensors, arguments = case("everything", torch.float32, device, scales=("query_scale",), **sizes)
    harness.check(tensors, causal=True, **arguments)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # the interpreter's, where tanh is 1
@pytest.mark.parametrize("softcap", [0.01, 1e4])
def test_a_softcap_far_below_and_far_above_the_logits(softcap, device):
    tensors = harness.inputs(torch.float32, device, q_len=Q_LEN, k_len=K_LEN, batch=1)
    harness.check(tensors, softcap=softcap, causal=True, return_aux=True)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # the interpreter's, where tanh is 1
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_gradient_of_a_scale_whose_logits_are_capped(dtype, device):
    """Small, since tanh is flat: the rounding of out, times the mean of logits without their slopes, would pass it."""
    tensors = harness.inputs(dtype, device, scales=("query_scale",), q_len=Q_LEN, k_len=K_LEN, batch=1)
    tensors["query_scale"] = tensors["query_scale"].abs() + 1
    harness.check(tensors, scale=2.0, softcap=1.5)


@pytest.mark.parametrize(("size", "aux"), [(-1e3, True), (50.0, True), (1e3, False)])
def test_a_sink_far_below_and_far_above_the_logits(size, aux, device):
    tensors = harness.inputs(torch.float32, device, q_len=Q_LEN, k_len=K_LEN, batch=1, group=3)
    tensors["sinks"] = torch.tensor([size, 0.0, -torch.inf], device=device)
    harness.check(tensors, causal=True, return_aux=aux)


@pytest.mark.parametrize("size", [5.0, 14.0, 25.0])
def test_the_gradient_of_lse_beside_a_sink_above_the_logits(size, device):
    """lse is without the sink, whose probability leaves the keys almost none of the row's."""
    tensors = harness.inputs(torch.float32, device, q_len=Q_LEN, k_len=K_LEN, batch=1, scales=("gain",))
    tensors["sinks"] = torch.full((2,), size, device=device)
    harness.check(tensors, tritonattn.attention, causal=True, return_aux=True)


def test_a_sink_of_minus_infinity_is_none(device):
    tensors = harness.inputs(torch.float32, device, q_len=30, k_len=20, batch=1)
    d_out = torch.ones_like(tensors["q"])
    plain = harness.run(tensors, d_out, tritonattn.scaled_attention, backend="triton", causal=True)
    tensors["sinks"] = torch.full((2,), -torch.inf, device=device)
    with_sinks = harness.run(tensors, d_out, tritonattn.scaled_attention, backend="triton", causal=True)
    for name, result in plain.items():
        torch.testing.assert_close(with_sinks[name], result, msg=name)
    assert not with_sinks["sinks"].any()


def test_the_statistics_of_rows_without_keys(device):
    tensors = harness.inputs(torch.float32, device, q_len=30, k_len=20, batch=1, scales=("sinks",))
    out, aux = tritonattn.scaled_attention(**tensors, causal=True, softcap=2.0, return_aux=True, backend="triton")
    for x, nothing in ((out, 0.0), (aux.lse, -torch.inf), (aux.max_logit, -torch.inf), (aux.entropy, 0.0)):
        assert (x[:, :, :10] == nothing).all()
        assert x[:, :, 10:].isfinite().all()


def test_statistics_change_no_result_and_have_no_gradient(device):
    tensors = harness.inputs(torch.float16, device, q_len=Q_LEN, k_len=K_LEN, scales=("query_scale",))
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    out, aux = tritonattn.scaled_attention(**leaves, causal=True, return_aux=True, backend="triton")
    assert torch.equal(out, tritonattn.scaled_attention(**leaves, causal=True, backend="triton"))
    assert aux.lse.requires_grad
    assert not aux.max_logit.requires_grad
    assert not aux.entropy.requires_grad
    assert {x.dtype for x in aux} == {torch.float32}


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


def test_dropout_follows_the_seed(device):
    first, again, other = (_probabilities(K_LEN, device, seed, causal=True) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("seed", [(2**63 - 1, 0), (-1, 2**31 - 2), (-(2**63), 5)])
def test_any_64_bits_are_a_seed(seed, device, monkeypatch):
    dropout = Dropout(0.4, torch.tensor(seed, device=device))
    monkeypatch.setattr(Dropout, "draw", lambda p, device: dropout)
    wanted = dropout.tile((2, 2), slice(0, Q_LEN), slice(0, K_LEN))
    assert torch.equal(_probabilities(K_LEN, device, seed=0) != 0, wanted)


@pytest.mark.parametrize("p", [1e-6, 1 - 1e-6])
def test_chances_near_0_and_1(p, device):
    tensors = harness.inputs(torch.float32, device, q_len=Q_LEN, k_len=K_LEN, batch=1)
    harness.check(tensors, dropout_p=p)


def test_results_repeat_to_the_bit(device):
    tensors, arguments = case("everything", torch.bfloat16, device, scales=("query_scale", "key_scale"), batch=1)
    d_out = torch.ones_like(tensors["q"])
    first, second = (
        harness.run(tensors, d_out, tritonattn.scaled_attention, backend="triton", causal=True, **arguments)
        for _ in range(2)
    )
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


@pytest.mark.parametrize("form", ["softcap", "everything"])
def test_hidden_keys_reach_nothing(form, device):
    tensors, arguments = case(form, torch.float32, device, scales=("query_scale", "key_scale"))
    arguments |= {"key_lengths": torch.tensor([11, 30], device=device), "causal": True}
    d_out = torch.ones_like(tensors["q"])
    clean = harness.run(tensors, d_out, tritonattn.scaled_attention, backend="triton", **arguments)
    for name in ("k", "v", "key_scale"):
        tensors[name][0, :, 11:], tensors[name][1, :, 30:] = torch.nan, torch.inf
    found = harness.run(tensors, d_out, tritonattn.scaled_attention, backend="triton", **arguments)
    for name, result in clean.items():
        torch.testing.assert_close(found[name], result, rtol=0, atol=0, msg=name)
