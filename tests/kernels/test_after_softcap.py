"""A factor behind the softcap in the kernels, against the reference in float64."""

from functools import partial

import pytest
import torch

import tritonattn
from tests.kernels import harness
from tests.support.packed import Packed
from tritonattn.scaling import Grok2

SCALING = {"scaling": Grok2(4, after_softcap=True), "softcap": 1.5}
RAGGED = Packed((3, 17, 40), (20, 17, 40))


@pytest.mark.parametrize(
    ("mask", "more"),
    [
        ("causal", {}),
        ("window", {"dropout_p": 0.3, "sinks": True}),
        ("ranges", {"key_bias": True}),
        ("lengths", {"key_bias": True, "bias": True, "bias_after_softcap": True}),
        ("causal", {"batch_invariant": True}),
    ],
)
def test_every_result_and_gradient(mask, more, device, small_tiles):
    terms = ("sinks", "key_bias", "bias")
    tensors = harness.inputs(torch.float32, device, scales=tuple(name for name in terms if name in more))
    options = {name: x for name, x in more.items() if name not in terms}
    tensors["q"] *= 4
    harness.check(
        tensors, partial(tritonattn.attention, **SCALING), return_aux=True, **harness.mask(mask, device), **options
    )


def test_packed_sequences(device):
    tensors = harness.packed_inputs(RAGGED, torch.float32, device)
    harness.check(tensors, partial(tritonattn.attention_varlen, **SCALING), **RAGGED.arguments(device), causal=True)


@pytest.mark.parametrize("more", [{}, {"window": (15, None)}])
def test_steps_over_a_cache(more, device):
    q, k, v = harness.inputs(torch.float32, device, q_len=3, k_len=64).values()
    options = {**SCALING, **more, "key_lengths": torch.tensor([20, 64], device=device)}
    exact = tritonattn.attention_decode(q.double(), k.double(), v.double(), backend="reference", **options)
    found = tritonattn.attention_decode(q, k, v, backend="triton", **options)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
