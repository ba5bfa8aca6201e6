"""Factors of distances, alone and beside biases, and one behind the softcap, against the reference in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import tritonattn
from tests.kernels import harness
from tests.support.masks import MASKS
from tests.support.packed import RAGGED
from tests.support.pairs import in_turn
from tritonattn.scaling import Grok2

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


BEHIND = {"scaling": Grok2(4, after_softcap=True), "softcap": 1.5}


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
def test_a_factor_behind_the_softcap(mask, more, device):
    terms = ("sinks", "key_bias", "bias")
    tensors = harness.inputs(SINGLE, device, scales=tuple(name for name in terms if name in more))
    options = {name: x for name, x in more.items() if name not in terms}
    tensors["q"] *= 4
    harness.check(
        tensors, partial(tritonattn.attention, **BEHIND), return_aux=True, **harness.mask(mask, device), **options
    )


def test_packed_sequences_behind_the_softcap(device):
    tensors = harness.packed_inputs(RAGGED, SINGLE, device)
    harness.check(tensors, partial(tritonattn.attention_varlen, **BEHIND), **RAGGED.arguments(device), causal=True)
