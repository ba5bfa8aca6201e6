"""Biases of pairs in the public functions: the kernels give the reference's results and gradients."""

import pytest
import torch
from torch import Tensor

from tests.kernels import harness
from tests.support.bound import assert_within_bound
from tests.support.packed import Packed, packed_operands
from tritonattn import Scales, Scaling, attention, attention_decode, attention_varlen

pytestmark = pytest.mark.usefixtures("small_tiles")


class Near(Scaling):
    """A user's own mode with a bias of distances beside a factor of the query."""

    name = "near"

    def scales(self, q, k, visibility, statistics):
        table = torch.arange(4.0, device=q.device)[None, None, None]
        return Scales(0.3, query=1 / (1 + statistics.query_norms(q)), relative_bias=table, relative_right=1)

    def multiplier(self, q, k, visible):
        return 0.3 / (1 + q.norm(dim=-1, keepdim=True))

    def relative_addend(self, q, k, distance):
        return torch.where((distance >= -1) & (distance < 3), distance + 1.0, 0)


def same(function, tensors: dict[str, Tensor], device: torch.device, **options) -> None:
    """Results, statistics and gradients are within the bound of those in fp64."""
    found = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference"), (torch.float32, "reference")):
        leaves = {name: x.detach().to(device, dtype).requires_grad_() for name, x in tensors.items()}
        out, aux = function(**leaves, backend=backend, return_aux=True, **options)
        loss = out.square().sum() + aux.lse[aux.lse.isfinite()].sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        found.append((out, *aux, *gradients))
    for names, *results in zip(("out", "lse", "max_logit", "entropy", *tensors), *found, strict=True):
        assert_within_bound(*results, torch.float32, name=names)


@pytest.mark.parametrize("scaling", ["sqrt_dim", "key_norm_mean", Near()], ids=["sqrt_dim", "key_norm_mean", "near"])
@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"window": (6, 2), "softcap": 2.0, "bias_after_softcap": True}, {"key_lengths": (20, 35)}],
    ids=str,
)
def test_dense_calls(scaling, options, device):
    tensors = harness.inputs(torch.float32, device, q_len=21, k_len=35)
    heads = tensors["q"].shape[1]
    tensors |= {"bias": torch.randn(heads, 1, 35), "relative_bias": torch.randn(1, heads, 1, 9)}
    if "key_lengths" in options:
        options = {"key_lengths": torch.tensor(options["key_lengths"], device=device)}
    same(attention, tensors, device, scaling=scaling, relative_right=3, **options)


def test_packed_calls(device):
    packed = Packed((5, 16), (9, 26))
    tensors = packed_operands(packed, torch.float32)
    tensors["relative_bias"] = torch.randn(tensors["q"].shape[1], 1, 6)
    arguments = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in packed.arguments().items()}
    same(attention_varlen, tensors, device, causal=True, relative_right=1, **arguments)


@pytest.mark.parametrize("new", [1, 3])
def test_decoding(new, device):
    tensors = harness.inputs(torch.float32, device, q_len=new, k_len=35)
    lengths = torch.tensor([30, 35], device=device)
    table = torch.randn(1, tensors["q"].shape[1], new, 8, device=device)
    q, k, v = (tensors[name].detach() for name in "qkv")
    ours, wanted = (
        attention_decode(q, k, v, key_lengths=lengths, relative_bias=table, backend=backend)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
