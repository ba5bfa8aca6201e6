"""attention() of few rows without a gradient: by the decode kernels, which share the keys among programs."""

import pytest
import torch

from tests.support.caches import sequences
from tritonattn import attention

pytestmark = pytest.mark.usefixtures("small_tiles")

FEW = {
    "a lone row": (1, {}),
    "causal rows": (7, {"causal": True}),
    "more rows than keys": (16, {"causal": True, "window": (80, 0)}),
    "a window": (1, {"window": (90, None)}),
    "a window of causal rows": (5, {"causal": True, "window": (90, 3)}),
    "lengths": (1, {"key_lengths": [0, 133]}),
    "ranges": (1, {"key_ranges": [[[9, 144]], [[12, 12]]]}),
    "ranges and lengths": (1, {"causal": True, "key_lengths": [100, 149], "key_ranges": [[[9, 144]], [[0, 150]]]}),
}
MANY = {
    "too many rows": (17, {"causal": True}),
    "rows that attend to all": (2, {}),
    "rows that attend to later keys": (2, {"window": (None, 1)}),
    "rows of lengths": (2, {"causal": True, "key_lengths": [0, 133]}),
    "a window of lengths": (1, {"window": (90, None), "key_lengths": [0, 133]}),
    "dropout": (1, {"dropout_p": 0.5}),
    "a mask": (1, {"mask": [True] * 149 + [False]}),
}


@pytest.mark.parametrize("form", [*FEW, *MANY])
def test_few_rows_of_attention(form, device, launched):
    """Results and statistics of one and of several splits, and the kernel that ran."""
    q_len, given = (FEW | MANY)[form]
    for k_len in (12, 150) if q_len > 12 else (150,):
        q, k, v = sequences(torch.float32, heads=(3, 1), length=k_len, dims=(16, 24), device=device)
        q = sequences(torch.float32, heads=(3, 1), length=q_len, dims=(16, 24), device=device)[0]
        masks = {name: torch.tensor(x, device=device) if isinstance(x, list) else x for name, x in given.items()}
        if "key_ranges" in masks and k_len == 150:
            k[:, :, :5], v[:, :, :5] = torch.nan, torch.inf  # hidden from all rows of the first sequence
            k[1, :, :5], v[1, :, :5] = 0.5, 0.5
        sinks = torch.linspace(-1, 2, 6 * q_len, device=device).view(2, 3, q_len)
        options = {"scaling": "key_norm_mean", "softcap": 3.0, "sinks": sinks, **masks}
        torch.manual_seed(0)
        out, aux = attention(q, k, v, **options, backend="triton", return_aux=True)
        torch.manual_seed(0)
        wanted, expected = attention(
            q.double(), k.double(), v.double(), **options, backend="reference", return_aux=True
        )
        torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
        for found, one in zip(aux, expected, strict=True):
            torch.testing.assert_close(found.double(), one, rtol=1e-5, atol=1e-5)
    names = {name for name, _ in launched}
    assert ("attention_decode" in names) == ("combine_splits" in names) == (form in FEW)


def test_ranges_of_few_rows_that_nobody_read_are_clamped(device, monkeypatch):
    """The largest number as the first key of a row without any; several splits."""
    monkeypatch.setattr("tritonattn.calls.sequence_checks.values_are_read", lambda *x: False)
    q, k, v = sequences(torch.float32, heads=(2, 1), length=150, dims=(16, 16), device=device)
    wild = torch.tensor([[[2**31 - 1, 150]], [[-5, 2**31 - 1]]], dtype=torch.int32, device=device)
    found = attention(q[:, :, -1:], k, v, key_ranges=wild, backend="triton")
    assert (found[0] == 0).all()
    torch.testing.assert_close(found[1], attention(q[:, :, -1:], k, v, backend="triton")[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_gradients_of_few_rows_are_those_of_the_forward_kernel(dtype, device, launched):
    tensors = sequences(dtype, heads=(2, 1), length=9, dims=(16, 16), device=device)
    q, k, v = (x.requires_grad_() for x in tensors)
    attention(q, k, v, causal=True, backend="triton").sum().backward()
    assert launched[0][0] == "attention_forward"
    assert k.grad.isfinite().all()
