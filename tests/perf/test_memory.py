"""Bytes kept for the backward: storages are counted once, and operands not at all."""

import torch

from perf.memory import forms, kept_bytes


def test_forms_keep_no_more_than_documented():
    """sqrt_dim on `sdpa`: output and lse as PyTorch's, and q with 0 in its first row."""
    assert kept_bytes(forms("sdpa")["`sqrt_dim`"], torch.float32, 64) <= 2 * 64 * 4 + 8
