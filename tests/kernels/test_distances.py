"""Factors of distances, alone and beside biases, against the reference in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import tritonattn
from tests.kernels import harness
from tests.support.masks import MASKS
from tests.support.packed import RAGGED
from tests.support.pairs import in_turn

HALF, SINGLE = torch.float16, torch.float32
SIZES = (2, 2, 21, 35)

pytestmark = pytest.mark.usefixtures("small_tiles")


def with_factors(tensors, dtype, *shape):
    """The tensors, and factors of distances of either sign, some 0."""
    factors = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    factors.view(-1)[::5] = 0
    return tensors | {"relative_scale": factors.to(tensors["q"].device, dtype)}


@pytest.mark.slow
@in_turn(
    mask=MASKS,
    table=[(2, 2, 21, 50), (1, 1, 1, 13), (1, 2, 1, 20)],
    dtype=[SINGLE, SINGLE, HALF],
    softcap=[None, (1.5, False), (1.5, True)],
    scales=[("query_scale",), ("query_scale", "key_scale"), ("query_scale", "key_bias", "sinks"), ("bias",), ()],
    heads=[(1, 2), (2, 1)],
)
def test_every_mask(mask, table, dtype, softcap, scales, heads, device):
    tensors = harness.inputs(dtype, device, kv_heads=heads[0], group=heads[1], scales=scales)
    options = {} if softcap is None else dict(zip(("softcap", "bias_after_softcap"), softcap, strict=True))
    tensors = with_factors(tensors, dtype, *table)
    options |= {"scale": 0.3, "relative_right": 7, "return_aux": True, **harness.mask(mask, device, *SIZES)}
    harness.check(tensors, summands=float(table[2] == 1), **options)  # an entry of all rows is a sum that cancels


@in_turn(mask=["causal", "window"], more=[{}, {"dropout_p": 0.3}, {"softcap": 2.0}])
def test_the_mode_of_the_paper(mask, more, device):
    """With a factor and a bias of distances, beside a bias of another extent."""
    tensors = harness.inputs(SINGLE, device, scales=("relative_bias",))
    attend = partial(tritonattn.attention, scaling="scale_invariant")
    harness.check(tensors, attend, relative_right=2, return_aux=True, **harness.mask(mask, device), **more)


def test_packed_sequences(device):
    tensors = harness.packed_inputs(RAGGED, SINGLE, device, scales=("gain",))
    attend = partial(tritonattn.attention_varlen, scaling="scale_invariant")
    harness.check(tensors, attend, summands=1.0, **RAGGED.arguments(device), causal=True)


@pytest.mark.parametrize("pages", [False, True])
def test_steps_over_a_cache(pages, device):
    q, k, v = harness.inputs(SINGLE, device, q_len=3, k_len=64).values()
    lengths = torch.tensor([20, 64], device=device)
    options = {"scaling": "scale_invariant", "key_lengths": lengths, "window": (15, None)}
    exact = tritonattn.attention_decode(q.double(), k.double(), v.double(), backend="reference", **options)
    if pages:  # of 16 keys
        k, v = (x.unflatten(2, (4, 16)).permute(0, 2, 3, 1, 4).flatten(0, 1) for x in (k, v))
        options["block_table"] = torch.arange(8, dtype=torch.int32, device=device).view(2, 4)
    found = tritonattn.attention_decode(q, k, v, backend="triton", **options)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
