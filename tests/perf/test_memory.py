"""Bytes kept for the backward: storages are counted once, and operands not at all."""

import pytest
import torch
import torch.nn.functional as F

from perf.memory import flash_attention_bytes, forms, kept_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pytorchs_attention_keeps_output_and_lse(dtype):
    def plain(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    assert kept_bytes(plain, dtype, 64) == flash_attention_bytes(dtype, 64)


def test_forms_keep_no_more_than_documented():
    """sqrt_dim on `sdpa`: output and lse as PyTorch's, and q with 0 in its first row."""
    assert kept_bytes(forms("sdpa")["`sqrt_dim`"], torch.float32, 64) <= 2 * 64 * 4 + 8
