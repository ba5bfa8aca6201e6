"""Visibility: all that it says, and sums and maxima over the keys that it shows, against the dense definition."""

import sys
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.masks import MASKS, visible_pairs
from tritonattn.core import ranges
from tritonattn.core.sequences import PackedAxis
from tritonattn.core.statistics import counts_of, max_over_keys, sum_over_keys
from tritonattn.core.visibility import Visibility

B, HQ, HKV = 2, 4, 2
LENGTHS = [(9, 9), (5, 11), (11, 5), (1, 13), (0, 4), (4, 0)]


def visibility_of(q_len, k_len, **arguments):
    q, k = torch.empty(B, HQ, q_len, 1), torch.empty(B, HKV, k_len, 1)
    return Visibility.of(q, k, **arguments)


def per_query_head(x):
    return x.repeat_interleave(HQ // x.shape[1], 1)


def check(visibility, expected):
    """Compare all that a record says with its visible pairs, [B, Hq, Sq, Sk]."""
    rows, k_len = expected.shape[:-1], expected.shape[-1]
    assert torch.equal(visibility.dense().expand_as(expected), expected)
    assert torch.equal(visibility.counts().expand(rows), expected.sum(-1).double())
    assert torch.equal(visibility.attending_rows().expand(rows), expected.any(-1))
    by_key_head = expected.any(-2).unflatten(1, (HKV, -1)).any(2)
    assert torch.equal(visibility.seen_keys().expand_as(by_key_head), by_key_head)
    lo, hi = visibility.ranges()
    assert ((0 <= lo) & (lo <= hi) & (hi <= k_len)).all()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows[0], HKV, k_len, dtype=torch.float64, generator=draw).mul(2).round()  # with ties
    x, weight = x.requires_grad_(), torch.randn(rows, dtype=torch.float64, generator=draw)

    shown = torch.where(expected, per_query_head(x)[:, :, None], 0)
    padded = torch.nn.functional.pad(x, (0, 1), value=-99)  # a key below all, so that an empty row has a maximum
    hidden = torch.where(torch.nn.functional.pad(expected, (0, 1), value=True), per_query_head(padded)[:, :, None], -98)
    first = (hidden == hidden.amax(-1, keepdim=True)).int().argmax(-1, keepdim=True)
    largest = torch.where(expected.any(-1), hidden.gather(-1, first).squeeze(-1), 0)
    for ours, theirs in ((sum_over_keys(x, visibility), shown.sum(-1)), (max_over_keys(x, visibility), largest)):
        assert ours.dtype == torch.float64
        assert ours.shape[1] == (HQ if visibility.per_query_head else HKV)
        torch.testing.assert_close(per_query_head(ours), theirs, rtol=1e-12, atol=1e-12)
        gradients = (torch.autograd.grad((per_query_head(y) * weight).sum(), x)[0] for y in (ours, theirs))
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name, lengths):
    arguments = MASKS[name](B, HQ, *lengths)
    visibility = visibility_of(*lengths, **arguments)
    check(visibility, visible_pairs((B, HQ, *lengths), **arguments))
    if visibility.key_lengths is None and visibility.key_ranges is None:
        assert visibility.ranges()[0].shape[0] == visibility.ranges()[1].shape[0] == 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_combination_of_ranges(data):
    q_len, k_len = data.draw(st.integers(0, 12)), data.draw(st.integers(0, 12))
    side = st.none() | st.integers(0, 14)
    bound = st.integers(-2, k_len + 2)
    arguments = {"causal": data.draw(st.booleans()), "window": (data.draw(side), data.draw(side))}
    if data.draw(st.booleans()):
        arguments["key_lengths"] = torch.tensor([data.draw(bound) for _ in range(B)])
    if data.draw(st.booleans()):
        bounds = [[[data.draw(bound), data.draw(bound)] for _ in range(q_len)] for _ in range(B)]
        arguments["key_ranges"] = torch.tensor(bounds, dtype=torch.int32).reshape(B, q_len, 2)
    check(visibility_of(q_len, k_len, **arguments), visible_pairs((B, HQ, q_len, k_len), **arguments))


@pytest.mark.parametrize("entries", [1, 2**10, 2**13])
def test_a_mask_longer_than_a_block_of_rows(monkeypatch, entries):
    """Blocks of 1, of 18 and of 146 rows."""
    monkeypatch.setattr(ranges, "_ENTRIES", entries)
    mask = torch.rand(B, HQ, 200, 7, generator=torch.Generator().manual_seed(3)) > 0.5
    check(visibility_of(200, 7, mask=mask), visible_pairs((B, HQ, 200, 7), mask=mask))


@pytest.mark.parametrize("row_counts", [None, torch.tensor([3, 1, 0])], ids=str)
@pytest.mark.parametrize(("q_len", "left", "right"), [(1, None, 0), (1, 2, 0), (3, None, 0), (3, 1, 0), (3, 2, 1)])
def test_rows_at_the_end_of_the_keys_of_their_entry(q_len, left, right, row_counts):
    """A cache and a padded batch; lengths outside [0, Sk] are clamped."""
    k_len, key_lengths = 8, torch.tensor([5, 2, 99])
    sizes = (3, HQ, HKV, q_len, k_len)
    visible = Visibility.of_padded(sizes, torch.device("cpu"), key_lengths, row_counts, left=left, right=right)
    rows = torch.full((3,), q_len) if row_counts is None else row_counts.clamp(max=q_len)
    row, key, keys = torch.arange(q_len)[:, None], torch.arange(k_len), key_lengths.clamp(max=k_len)[:, None, None]
    position = row + keys - rows[:, None, None]
    dense = (key <= position + right) & (key < keys) & (row < rows[:, None, None])  # [B, Sq, Sk]
    dense = dense if left is None else dense & (key >= position - left)
    dense = dense[:, None].expand(-1, HQ, -1, -1)
    check(visible, dense)
    check(visible.as_ranges(), dense)
    part = Visibility.of_part(visible, 2, 4)
    assert torch.equal(part.dense().expand(-1, HQ, -1, -1), dense[..., 2:6])
    assert torch.equal(part.counts(), visible.counts())


@pytest.mark.parametrize("q_len", [1, 2, 5])
def test_sizes_alone_tell_full_visibility(q_len):
    sides = [None, 0, 1, 3, 6]
    for k_len, left, right, causal in product([1, 2, 5, 7], sides, sides, [False, True]):
        visible = visibility_of(q_len, k_len, window=(left, right), causal=causal)
        dense = visible.dense()
        assert visible.is_full == dense.all().item(), (k_len, left, right, causal)
        assert visible.attends_to_every_key == dense.any(-2).all().item(), (k_len, left, right, causal)
        is_triangle = left is None and q_len == k_len and (causal or right == 0)
        assert visible.is_square_causal == is_triangle, (k_len, left, right, causal)


@pytest.mark.parametrize("far", [2**62 - 1, 2**62, sys.maxsize - 3, sys.maxsize, 2**64])
def test_a_window_of_any_size_does_not_overflow(far):
    for lengths, (window, same) in product(LENGTHS, (((far, far), None), ((2, far), (2, None)), ((far, 1), (None, 1)))):
        visible = visibility_of(*lengths, window=window).dense()
        assert torch.equal(visible, visibility_of(*lengths, window=same).dense())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_bounds_of_dtypes_that_cannot_hold_the_number_of_keys(dtype):
    """uint8 holds no Sk of 300, int16 no 40,000."""
    k_len, bounds = (300, [7, 250]) if dtype == torch.uint8 else (40_000, [7, 30_000])
    visibility = visibility_of(1, k_len, key_ranges=torch.tensor(bounds, dtype=dtype).expand(B, 1, 2))
    assert torch.stack(visibility.ranges(), -1)[1, 0].tolist() == bounds
    visibility = visibility_of(1, k_len, key_lengths=torch.tensor(bounds, dtype=dtype))
    assert visibility.ranges()[1].flatten().tolist() == bounds


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_layers_of_one_layout_share_its_ranges(dtype):
    """And counts, in inference too; lengths that change, and ranges that a user's scaling wrote to, are no such."""
    lengths = torch.tensor([4, 7], dtype=dtype)
    with torch.inference_mode():
        first = visibility_of(1, 7, key_lengths=lengths.clone())
        assert counts_of(first).flatten().tolist() == [4, 7]
        cache = Visibility.of_padded((B, HQ, HKV, 1, 7), lengths.device, lengths.clone())
        assert cache.ranges()[1].flatten().tolist() == [4, 7]
    first, second = (visibility_of(1, 7, key_lengths=lengths) for _ in range(2))
    assert first.ranges() is second.ranges()
    assert counts_of(first) is counts_of(second)
    assert not counts_of(first).is_inference()
    first.ranges()[1].zero_()
    assert visibility_of(1, 7, key_lengths=lengths).ranges()[1].flatten().tolist() == [4, 7]
    lengths[0] = 5
    assert second.ranges()[1].flatten().tolist() == [4, 7]
    assert visibility_of(1, 7, key_lengths=lengths).ranges()[1].flatten().tolist() == [5, 7]
    assert visibility_of(2, 7, key_lengths=lengths).ranges()[1].tolist() == [[5, 5], [7, 7]]
    at_end = Visibility.of_padded((B, HQ, HKV, 2, 7), lengths.device, lengths)
    assert at_end.ranges()[1].tolist() == [[4, 5], [6, 7]]


def test_entries_of_no_sequence_are_zero_there_and_back():
    """Sequences of 2 and 3 entries on an axis of 7; also the gradients, each the other's move."""
    axis = PackedAxis(torch.tensor([0, 2, 5]), 3, 7)
    x = torch.arange(1.0, 15).double().reshape(1, 2, 7).requires_grad_()
    padded = axis.unpacked(x)
    assert torch.equal(padded[0], torch.nn.functional.pad(x[0, :, :2], (0, 1)))
    assert torch.equal(padded[1], x[0, :, 2:5])
    belongs = torch.arange(7) < 5
    assert torch.equal(axis.packed(padded), x * belongs)
    assert torch.equal(torch.autograd.grad(padded.sum(), x)[0], belongs.double().expand(1, 2, 7))


def test_gradients_of_the_heads_of_a_group_add_up_in_one_order_where_invariant():
    """torch adds up 8 heads or more in an order that follows the other sizes."""
    g = torch.randn(3, 16, 7, generator=torch.Generator().manual_seed(0))

    def gradient(g):
        shape = torch.Size((g.shape[0], 16, g.shape[2], 1))
        visible = Visibility.of_shapes(shape, torch.Size((*shape[:1], 2, 4, 1)), g.device, invariant=True)
        x = torch.ones(g.shape[0], 2, g.shape[2], requires_grad=True)
        return torch.autograd.grad(visible.repeated(x), x, g)[0]

    assert torch.equal(gradient(g)[1:2, :, :3], gradient(g[1:2, :, :3].clone()))
