"""The kernels of derivatives beyond the first against float64: tangents, and the gradients of tangents."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

import tritonattn
from tests.kernels.derivatives import BIASES, FORMS, NAMES, SCALES, Case, case_of
from tests.support.bound import assert_within_bound
from tests.support.calls import changed
from tests.support.derivatives import tensors_of
from tests.support.slow import slow_but
from tritonattn.core.terms import Gradients, Needs

pytestmark = [
    pytest.mark.usefixtures("small_tiles"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script"),  # of the first torch.func.jvp
]


@pytest.mark.parametrize("form", slow_but(["capped"], FORMS))
def test_every_term(form, device):
    case_of(FORMS[form], device).check()


@pytest.mark.parametrize("name", slow_but(["q", "query_scale"], NAMES))
def test_one_tensor_has_a_tangent(name, device):
    """All gradients, those towards the tangents of others too; each alone has the bits that it has among all."""
    case = case_of(f"{BIASES} key_scale sinks", device, lengths=(17, 18))
    case.tangents = Gradients(**{name: getattr(case.tangents, name)})
    found = case.check()
    alone, none = Needs(**{name: True}), Needs()
    for asked, key in (((alone, none), name), ((none, alone), f"dot {name}")):
        one = case.found(*asked)
        assert torch.equal(one[key], found[key])
        assert set(one) == {"out", "lse", key}


@pytest.mark.parametrize("dims", [(64, 40), (17, 24)], ids=str)
def test_float16(dims, device):
    case_of(f"{SCALES} sinks", device, torch.float16, dims).check()


def test_keys_and_values_with_means_in_float16(device):
    """Row terms come from no output of 16 bits, whose error would reach d_q times the mean key."""
    case = case_of("right query_scale", device, torch.float16, (32, 32), (33, 48))
    replace(case, call=changed(case.call, k=case.call.k + 3, v=case.call.v + 3)).check()


def test_a_row_of_one_key_has_the_tangent_of_its_value_in_float16(device):
    """A logit's tangent of any size cancels there, and what it loses when it is rounded does too."""
    case = case_of("query_scale", device, torch.float16, (32, 32), (8, 1))
    case.tangents = case.tangents._replace(q=4 * case.tangents.q)
    exact = case.tangents.v.expand_as(case.d_out)
    assert_within_bound(case.found(Needs(), Needs())["out"], exact, exact, torch.float16)


@pytest.mark.parametrize("size", [1e-3, 3000.0])
def test_scales_of_any_size_in_float16(size, device):
    """Factors whose product is that of 1, neither of whose sizes may push what is rounded out of 16 bits' range."""
    case = case_of(SCALES, device, torch.float16, (32, 32))
    for record in (case.call.terms, case.tangents):
        scaled = {"query_scale": record.query_scale / size, "key_scale": record.key_scale * size}
        if record is case.tangents:
            case.tangents = case.tangents._replace(**scaled)
        else:
            case.call = changed(case.call, **scaled)
    case.check()


def test_sharp_softmaxes(device):
    """A shift of all keys' tangents cancels, though a rounded lse of 15 leaves weights that do not sum to 1."""
    case = case_of("query_scale", device, lengths=(8, 16))
    replace(case, call=changed(case.call, q=8 * case.call.q)).check()


@pytest.mark.usefixtures("new_memory_holds_nan")
def test_hidden_keys_and_rows_without_keys_reach_nothing(device):
    """NaN in them and in their tangents."""
    case = case_of(f"{SCALES} key_lengths", device, lengths=(40, 35))  # 5 rows without keys
    visible = replace(case.call.visibility, key_lengths=torch.tensor([35, 22], dtype=torch.int32, device=device))
    case.call = case.call.changed(visibility=visible)
    clean = case.found()
    tensors, tangents = tensors_of(case.call), case.tangents._asdict()
    for record, name in product((tensors, tangents), ("q", "k", "v", "key_scale")):
        record[name] = record[name].clone()
        hidden = (slice(None), slice(None), slice(5)) if name == "q" else (1, slice(None), slice(22, None))
        record[name][hidden] = torch.nan
    case.call, case.tangents = changed(case.call, **tensors), Gradients(**tangents)
    for name, x in case.found().items():
        assert clean[name].isfinite().all(), name
        assert torch.equal(x, clean[name]), name


def test_repetitions_have_the_same_bits(device):
    case = case_of(FORMS["pairs"], device)
    one, other = case.found(), case.found()
    for name, x in one.items():
        assert torch.equal(x, other[name]), name


def test_a_gradient_of_a_gradient_launches_the_tangent_once(device, launched):
    """Though terms of rows and the gradient towards d_out need it; with the derivatives of these it is two passes."""
    operands = [torch.randn(1, 2, 19, 16, device=device) for _ in range(4)]

    def found(dtype: torch.dtype, **options: Any) -> list[torch.Tensor]:
        q, k, v, d_out = (x.detach().to(dtype).requires_grad_() for x in operands)
        out = tritonattn.attention(q, k, v, causal=True, **options)
        gradients = torch.autograd.grad(out, (q, k, v), d_out, create_graph=True)
        launched.clear()
        penalty = sum(x.square().sum() for x in gradients)
        return [*torch.autograd.grad(penalty, (q, k, v, d_out))]

    exact, eager = (found(dtype, backend="reference") for dtype in (torch.float64, torch.float32))
    ours = found(torch.float32, backend="triton")
    assert [name for name, _ in launched].count("attention_tangent") == 1
    for name, *of in zip(("q", "k", "v", "d_out"), ours, exact, eager, strict=True):
        assert_within_bound(*of, torch.float32, name=name)


def test_operands_of_any_strides(device):
    """Transposed tangents, an expanded gradient of out, and none of lse."""
    case = case_of(SCALES, device)
    turned = {name: getattr(case.tangents, name).transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"}
    tangents, d_out = case.tangents._replace(**turned), case.d_out[..., :1].expand_as(case.d_out)
    Case(case.call, tangents, d_out, None).check()


@pytest.mark.parametrize(("dims", "dtype"), [((16, 144), torch.float32), ((272, 16), torch.float16)], ids=str)
def test_wider_heads_take_tiles_in_torch(dims, dtype, device, launched):
    case_of(SCALES, device, dtype, dims, (5, 9)).check()
    assert not [name for name, _ in launched if name == "attention_tangent" or name.endswith("second")]
