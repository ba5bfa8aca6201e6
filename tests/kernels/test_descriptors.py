"""Tiles loaded by tensor descriptors are those loaded by pointers: every result has the same bits."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

import tritonattn
from tests.kernels import harness
from tests.kernels.conftest import DEVICE
from tests.support.packed import Packed
from tests.support.pairs import in_turn
from tests.support.versions import TRITON
from tritonattn.backends.triton import launch
from tritonattn.tuning.config import Target

TAKE_DESCRIPTORS = ("forward", "grad_key_value", "grad_query")

pytestmark = [
    pytest.mark.usefixtures("small_tiles"),
    pytest.mark.skipif(
        not launch.interpreting and (torch.version.hip is not None or int(Target.of(DEVICE).arch) < 90),
        reason="the tensor memory accelerator came with sm_90",
    ),
    pytest.mark.skipif(
        launch.interpreting and TRITON < (3, 5), reason="the interpreter takes strides in elements for bytes"
    ),
]


def _check(tensors: harness.Tensors, monkeypatch: pytest.MonkeyPatch, attend=tritonattn.scaled_attention, **arguments):
    """Compare the two ways, out and every gradient."""
    d_out = torch.randn((*tensors["q"].shape[:-1], tensors["v"].shape[-1]), generator=torch.Generator().manual_seed(1))
    d_out = d_out.to(tensors["q"])
    by_pointers = harness.by_kernels(tensors, attend, d_out, **arguments)
    small, run, took = launch.config_for, launch.run, set()

    def config(kernel, problem, target):
        return replace(small(kernel, problem, target), descriptors=kernel in TAKE_DESCRIPTORS)

    def watched(kernel, grid, values, tiles):
        took.update(name for name, value in values.items() if isinstance(value, TensorDescriptor))
        run(kernel, grid, values, tiles)

    monkeypatch.setattr(launch, "config_for", config)
    monkeypatch.setattr(launch, "run", watched)
    by_descriptors = harness.by_kernels(tensors, attend, d_out, **arguments)
    assert took == {"q_descriptor", "k_descriptor", "v_descriptor", "d_out_descriptor"}
    harness.assert_same(by_descriptors, by_pointers)


@in_turn(mask=["full", "causal window", "ranges", "causal"], dims=[(8, 24), (40, 16), (96, 64), (16, 16)])
def test_masks_and_widths_that_fill_no_block(mask, dims, device, monkeypatch):
    sizes = {"head_dim": dims[0], "value_dim": dims[1], "kv_heads": 2, "group": 1, "batch": 1}
    tensors = harness.inputs(torch.float16, device, scales=("query_scale", "key_scale"), **sizes)
    _check(tensors, monkeypatch, **harness.mask(mask, device, batch=1))


def test_strides(device, monkeypatch):
    """q, k and v cut from one projection [B, S, 3, H, D]."""
    projected = harness.inputs(torch.float16, device, batch=1, q_len=6 * 36, group=1)["q"].view(1, 36, 3, 2, 16)
    tensors = dict(zip("qkv", (x.transpose(1, 2) for x in projected.unbind(2)), strict=True))
    _check(tensors, monkeypatch, causal=True)


def test_packed_sequences(device, monkeypatch):
    packed = Packed((19, 0, 3), (20, 4, 35), q_tail=5, k_tail=17)
    tensors = harness.packed_inputs(packed, torch.float16, device, scales=("gain",))
    attend = partial(tritonattn.attention_varlen, **packed.arguments(device))
    _check(tensors, monkeypatch, attend, causal=True, return_aux=True)
