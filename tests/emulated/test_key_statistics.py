"""The pass over the keys on sm_80 and sm_90: lengths, their prefix sums, and the way back into k."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from tritonattn import triton_backend
from tritonattn.statistics import key_lengths_of

from .executor import GPU, padded


def check(dtype: torch.dtype, head_dim: int, k_len: int, some_unseen: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(2, 2, k_len, head_dim, generator=generator).to(dtype)
    seen = torch.rand(2, 2, k_len, generator=generator) < 0.7 if some_unseen else None
    k[:, :, 3] = 0
    exact = k.double() if seen is None else torch.where(seen[..., None], k, 0).double()
    leaf = exact.requires_grad_()
    expected = key_lengths_of(leaf)
    d_lengths = torch.randn(2, 2, k_len, generator=generator)
    expected.backward(d_lengths.double())
    k = padded(k if seen is None else torch.where(seen[..., None], k, torch.nan))
    lengths, length_prefix, square_prefix = triton_backend.key_statistics(k, seen)
    torch.testing.assert_close(lengths.double(), expected.detach(), rtol=1e-6, atol=0)
    for prefix, terms in ((length_prefix, lengths.double()), (square_prefix, lengths.double().square())):
        assert (prefix[..., 0] == 0).all()
        torch.testing.assert_close(prefix[..., 1:], terms.cumsum(-1), rtol=1e-12, atol=0)
    d_k = triton_backend.key_statistics_backward(k, seen, lengths, d_lengths)
    tolerance = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(d_k.double(), leaf.grad, rtol=tolerance, atol=tolerance)



@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("head_dim", "k_len"), [(17, 1100), (128, 150)])
def test_key_statistics(head_dim, k_len, dtype, capability, emulate):
    executor = emulate(GPU(capability))
    check(dtype, head_dim, k_len, some_unseen=dtype != torch.float32)
    assert executor.launched == ["key_lengths", "key_prefix_sums", "key_statistics_grad"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 192, 256])
def test_head_dims(head_dim, dtype, capability, emulate):
    emulate(GPU(capability))
    for k_len, some_unseen in ((150, False), (37, True)):
        check(dtype, head_dim, k_len, some_unseen)
