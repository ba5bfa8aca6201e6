"""The kernels of docs/examples/kernel.py: their output and every gradient, against float64."""

import functools

import pytest
import torch

import tritonattn
from docs.examples import kernel as lesson
from tests.kernels import harness


def attend(q, k, v, query_scale, key_scale, *, backend, **options):
    if backend == "triton":
        return lesson.Attention.apply(q, k, v, query_scale, key_scale)
    return tritonattn.scaled_attention(q, k, v, query_scale, key_scale, scale=1.0, causal=True, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # the interpreter truncates to bfloat16
@pytest.mark.parametrize("length", [1, 64, 97])
def test_results_and_gradients(length, dtype, device):
    """The gradients of the scales in float32 only: docs/kernels.md says why not in 16 bits."""
    sizes = {"kv_heads": 2, "group": 1, "q_len": length, "k_len": length, "head_dim": 32, "value_dim": 32}
    tensors = harness.inputs(dtype, device, scales=("query_scale", "key_scale"), **sizes)
    cancelling = float(length == 1)  # one key: exact gradients of logits are 0
    if dtype == torch.float32:
        harness.check(tensors, attend, summands=cancelling)
    else:
        scales = {name: tensors.pop(name) for name in ("query_scale", "key_scale")}
        harness.check(tensors, functools.partial(attend, **scales), summands=cancelling)
