"""The pass over the keys on sm_80 and sm_90: norms, their prefix sums, and the way back into k."""

from __future__ import annotations

import pytest
import torch

from tests.support.caches import check_cuts
from tests.support.masks import assert_rows_of_key_blocks, largest_keys, visible_pairs
from tests.support.versions import OLDER_TRITON
from tritonattn import KeyStatistics
from tritonattn.backends import triton as triton_backend
from tritonattn.backends.triton import ranges, records
from tritonattn.core.norms import key_norms_of
from tritonattn.core.ranges import prefix_sum
from tritonattn.core.visibility import Visibility

from .executor import GPU, padded


def check(dtype: torch.dtype, head_dim: int, k_len: int, some_unseen: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(2, 2, k_len, head_dim, generator=generator).to(dtype)
    seen = torch.rand(2, 2, k_len, generator=generator) < 0.7 if some_unseen else None
    k[:, :, 3] = 0
    exact = k.double() if seen is None else torch.where(seen[..., None], k, 0).double()
    leaf = exact.requires_grad_()
    expected = key_norms_of(leaf)
    d_norms = torch.randn(2, 2, k_len, generator=generator)
    expected.backward(d_norms.double())
    k = padded(k if seen is None else torch.where(seen[..., None], k, torch.nan))
    norms = triton_backend.key_norms(k, seen)
    torch.testing.assert_close(norms.double(), expected.detach(), rtol=1e-6, atol=0)
    for addends in (norms, norms.double().square()):
        sums = triton_backend.prefix_sums(addends)
        assert (sums[..., 0] == 0).all()
        torch.testing.assert_close(sums[..., 1:], addends.double().cumsum(-1), rtol=1e-12, atol=0)
    d_k = triton_backend.key_norms_backward(k, seen, norms, d_norms)
    tolerance = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(d_k.double(), leaf.grad, rtol=tolerance, atol=tolerance)
    added = torch.randn(k.shape, generator=generator).to(dtype)
    both = triton_backend.key_norms_backward(k, seen, norms, d_norms, added)
    torch.testing.assert_close(both.double(), leaf.grad + added.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_key_statistics(emulate):
    executor = emulate(GPU(90))
    check(torch.float16, head_dim=17, k_len=1100, some_unseen=True)
    assert executor.launched == [
        "key_statistics_kernel",
        *["prefix_sums_kernel"] * 2,
        *["key_statistics_grad_kernel"] * 2,
    ]


def test_prefix_sums_begin_again(emulate):
    """NaN before a restart, in the same block and in the one before, reaches nothing behind it."""
    executor = emulate(GPU(90))
    generator = torch.Generator().manual_seed(0)
    addends, restarts = torch.randn(1, 2, 4500, generator=generator), torch.zeros(1, 1, 4500, dtype=torch.bool)
    restarts[..., [7, 40, 41, 1300, 4200]] = True
    addends[..., [3, 4199]] = torch.nan
    found, expected = triton_backend.prefix_sums(addends, restarts), prefix_sum(addends, restarts)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert found[..., 8:4200].isfinite().all()
    assert found[..., 4201:].isfinite().all()
    assert executor.launched == ["prefix_sums_kernel"]


def test_append_keys(emulate):
    executor = emulate(GPU(80))
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (KeyStatistics(2, 2, 140) for _ in range(2))
    for new, counts in ((130, [130, 67]), (1, None), (5, [0, 3])):
        k = torch.randn(2, 2, new, 17, generator=generator).bfloat16()
        k[:, 1, 0] = torch.nan if new == 5 else 2
        counts = None if counts is None else torch.tensor(counts)
        theirs.append(k, counts)
        triton_backend.append_keys(padded(k), counts, ours._buffers())
    assert executor.launched == [
        "key_statistics_kernel",
        "append_keys_kernel",
        "append_keys_kernel",
        "append_keys_kernel",
    ]
    assert ours.counts.tolist() == theirs.counts.tolist() == [131, 71]
    for found, expected in zip(ours._buffers()[1:], theirs._buffers()[1:], strict=True):
        for one, other, count in zip(found, expected, [131, 71], strict=True):
            end = count if found is ours._memory[0] else count + 1
            torch.testing.assert_close(one[:, :end], other[:, :end], rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.skipif(OLDER_TRITON, reason="other compilers add in another order")
def test_sums_of_appended_keys_do_not_depend_on_how_they_are_cut(emulate):
    """Blocks of 64 sums: keys so wide are measured 16 at a time."""
    executor = emulate(GPU(80))
    k = torch.randn(1, 1, 134, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    check_cuts(
        k, [(134,), (63, 2, 1, 68)], lambda new, ours: triton_backend.append_keys(padded(new), None, ours._buffers())
    )
    assert executor.launched == [
        "key_statistics_kernel",
        *["append_keys_kernel"] * 4,
        "key_statistics_kernel",
        "append_keys_kernel",
    ]


def test_passes_over_ranges(emulate):
    executor = emulate(GPU(80))
    key_ranges = torch.randint(-3, 60, (2, 33, 2), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    key_lengths = torch.tensor([50, 20])
    q, k = torch.empty(2, 1, 33, 16), torch.empty(2, 1, 50, 16)
    visibility = Visibility.of(q, k, causal=True, key_lengths=key_lengths, key_ranges=key_ranges)
    bounds = ranges.rows_of_key_blocks(visibility, records.view_of(visibility), 16)
    x = torch.randint(0, 9, (2, 3, 50), generator=torch.Generator().manual_seed(1)) / 4
    x[1, 1, 8::20], x[1, 2, 7::30], x[:, 0] = torch.inf, torch.nan, torch.arange(50)
    lo, hi = visibility.ranges()
    largest = ranges.argmax_over_ranges(x, lo[:, None], hi[:, None])
    seen = ranges.seen_keys(visibility)
    assert executor.launched == ["row_bounds_kernel", "argmax_of_ranges", "keys_seen"]
    pairs = visible_pairs((2, 1, 33, 50), causal=True, key_lengths=key_lengths, key_ranges=key_ranges)
    assert_rows_of_key_blocks(bounds, pairs[:, 0], 16)
    assert torch.equal(seen, pairs.any(2))
    has_keys = pairs.any(-1).expand_as(largest)
    assert torch.equal(largest[has_keys], largest_keys(x, pairs)[has_keys])
