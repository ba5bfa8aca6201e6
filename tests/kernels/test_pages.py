"""The kernels over keys in pages: the bits of the same calls over keys that lie one after another."""

import pytest
import torch

from tests.support.eight_bit import descale_of, in_pages
from tests.support.packed import Packed, one_by_one
from tests.support.pages import PagedBatch, check_appends, paged_call
from tests.support.pairs import in_turn
from tritonattn import attention_varlen
from tritonattn.backends import triton as triton_backend

pytestmark = pytest.mark.usefixtures("small_tiles")

# New tokens of each sequence, from 1 to a whole prompt, behind cached keys or not.
ROWS = Packed((1, 18, 0, 3), (20, 18, 5, 40), q_tail=2, k_tail=3)
EVERYTHING = {"terms": ("query_scale", "key_scale", "key_bias", "sinks"), "softcap": 1.5}
CASES = {
    "plain": (16, {"invariant": True}),
    "a window, key heads shared": (21, {"heads": (4, 2), "window": (18, None), "dims": (17, 24)}),
    "every term": (64, EVERYTHING),
    "a lost page": (16, {"lost": (3, 1), "terms": ("key_scale",), "heads": (3, 3)}),
}


@pytest.mark.parametrize("name", CASES)
def test_bits_of_the_contiguous_form(name, device, launched):
    page, form = CASES[name]
    calls = paged_call(ROWS, torch.float32, page, causal=True, device=device, **form)
    found, expected = (triton_backend.forward(call, aux=True) for call in calls)
    assert all(map(torch.equal, found, expected))
    assert [kernel for kernel, _ in launched] == ["attention_forward"] * 2


@in_turn(kind=["tensor", "head", "sequence"], scaling=["inkling2", "log_key_count", "key_norm_mean"])
@torch.no_grad()
def test_packed_rows_over_8_bit_pages(kind, scaling, device):
    """Against float64 of the dequantised keys and values, with more rows than one, and without any."""
    batch = PagedBatch(ROWS.q_lengths, ROWS.k_lengths, 21, dtype=torch.float32, dims=(17, 24))
    arguments, *held = in_pages(batch, *(descale_of(kind, 4, 2, seed) for seed in (0, 1)))
    given = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    options = {"scaling": scaling, "window": (18, None)}
    found, aux = attention_varlen(**given, causal=True, backend="triton", return_aux=True, **options)
    exact, rows = one_by_one(batch.packed, batch.q.double(), *held, causal=True, **options)
    torch.testing.assert_close(found.double().cpu(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(aux.lse.double().cpu(), rows.lse, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_appended_norms(device):
    check_appends(torch.float32, 24, device)
