"""The parts into which the visible pairs of a call are cut for PyTorch's kernel."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as tried
from hypothesis import strategies as st

import tritonattn
from tests.kernels import harness
from tritonattn.backends.cpu import parts
from tritonattn.core.sequences import Sequences
from tritonattn.core.visibility import Visibility

from . import test_by_parts
from .test_cpu import CPU

small_parts = test_by_parts.small_parts


def pairs_of(found, visible):
    """How often each pair of an entry is in a part, as one of its form: int [B, Sq, Sk]; -1 where a mask decides."""
    count = torch.zeros(visible.batch, visible.q_len, visible.k_len, dtype=torch.int)
    for whole in found:
        for part in parts.unstacked(whole):
            pairs = torch.ones(part.height, part.width, dtype=torch.int)
            if part.form == "causal":
                assert part.height == part.width
                pairs = pairs.tril()
            if part.form == "ranges":
                lo, hi = (x.expand(visible.batch, -1)[part.batch, part.rows, None] for x in visible.ranges())
                key = torch.arange(part.keys.start, part.keys.stop)
                pairs = ((key >= lo) & (key < hi)).int()
            count[part.batch, part.rows, part.keys] += pairs
    return count


@st.composite
def ranges(draw):
    """Ranges of 1 to 3 entries: documents, windows, padding, and what no rule makes."""
    batch, rows, keys = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    bounds = torch.empty(batch, rows, 2, dtype=torch.int32)
    for entry in range(batch):
        row = 0
        while row < rows:
            length = draw(st.integers(1, rows - row))
            lo, hi = draw(st.integers(0, keys)), draw(st.integers(0, keys))
            steps = draw(st.sampled_from([(0, 0), (0, 1), (1, 1), (1, 0), (2, 1)]))
            at = torch.arange(length)
            bounds[entry, row : row + length, 0] = lo + at * steps[0]
            bounds[entry, row : row + length, 1] = hi + at * steps[1]
            row += length
        if entry and draw(st.booleans()):
            bounds[entry] = bounds[entry - 1]
    return bounds.clamp(0, keys), keys


@given(ranges(), st.booleans())
@tried(max_examples=150, deadline=None)
def test_parts_hold_every_visible_pair_once(drawn, may_join):
    bounds, keys = drawn
    batch, rows, _ = bounds.shape
    visible = Visibility(batch, 1, 1, rows, keys, CPU, key_ranges=bounds)
    lo, hi = (x[:, :, None] for x in visible.ranges())
    key = torch.arange(keys)
    assert torch.equal(pairs_of(parts.parts_of(visible, may_join).every, visible), ((key >= lo) & (key < hi)).int())


@pytest.mark.parametrize("rows", [9, 17, 48])
def test_rows_without_keys_at_the_end_of_a_part_are_none(rows):
    """A window that leaves the keys behind: PyTorch's kernel divides by the number of keys of a part."""
    visible = Visibility(1, 2, 2, 48, 48, CPU, left=rows - 1, right=0, key_lengths=torch.tensor([20]))
    assert all(part.width for part in parts.parts_of(visible).every)
    tensors = harness.inputs(torch.float32, CPU, kv_heads=2, q_len=48, k_len=48)
    test_by_parts.check(tensors, window=(rows - 1, 0), key_lengths=torch.tensor([20, 33]))


def test_layers_of_one_layout_share_its_parts():
    lengths, shape = torch.tensor([40, 64]), (2, 2, 64, 8)
    found = [parts.parts_of(Visibility.of_shapes(shape, shape, CPU, key_lengths=lengths)) for _ in range(2)]
    assert found[0] is found[1]
    lengths[1] = 9
    changed = parts.parts_of(Visibility.of_shapes(shape, shape, CPU, key_lengths=lengths))
    assert [part.width for part in changed.every] == [40, 9]


def test_short_documents_of_one_length_are_one_part():
    starts = torch.arange(0, 65, 2, dtype=torch.int32)
    visible = Visibility(1, 2, 2, 64, 64, CPU, right=0, sequences=Sequences(starts, starts, 2, 2))
    assert [(part.form, part.count, part.height) for part in parts.parts_of(visible).every] == [("causal", 32, 2)]


@pytest.mark.parametrize(
    ("starts", "count", "splits_keys"),
    [((0, 32, 64), 1, True), ((0, 16, 64), 2, True), ((0, 32), 1, False), ((0, 24, 48), 1, False)],
)
def test_gradients_of_documents_that_lie_side_by_side(starts, count, splits_keys):
    """Equal ones are one part, whose results are views; keys of no document have gradients of 0."""
    starts = torch.tensor(starts, dtype=torch.int32)
    leaves = torch.randn(3, 64, 2, 8, generator=torch.Generator().manual_seed(0)).unbind()
    leaves = [x.requires_grad_() for x in leaves]
    found = {}
    for backend in ("sdpa", "reference"):
        options = {"causal": True, "backend": backend, "scaling": 0.3}
        out = tritonattn.attention_varlen(*leaves, starts, starts, 64, 64, **options)
        found[backend] = (out, *torch.autograd.grad(out.square().sum(), leaves))
    torch.testing.assert_close(found["sdpa"], found["reference"], rtol=1e-4, atol=1e-5)
    cut = parts.parts_of(Visibility(1, 2, 2, 64, 64, CPU, right=0, sequences=Sequences(starts, starts, 64, 64)))
    assert (len(cut.every), cut.splits_keys) == (count, splits_keys)


def test_steps_over_caches_of_different_lengths_read_their_keys_alone(monkeypatch):
    """One mask for all would be fewer calls of the kernel, which reads more keys than a row has pairs to compute."""
    monkeypatch.setattr(parts, "_CALL", 30_000)
    lengths = torch.tensor([1024, 768, 512, 341, 1019, 204, 128, 515])
    visible = Visibility.of_padded((8, 8, 8, 1, 1024), CPU, lengths)
    assert [(part.form, part.width) for part in parts.parts_of(visible).every] == [("full", n) for n in lengths]


def test_documents_at_other_distances_are_parts_of_their_own():
    first = torch.tensor([0, 10, 20, 40, 60]).repeat_interleave(8)
    bounds = torch.stack([first, first + torch.arange(40) % 8 + 1], -1)[None].int()
    found = parts.parts_of(Visibility(1, 2, 2, 40, 70, CPU, key_ranges=bounds)).every
    assert [(part.count, part.key_step) for part in found] == [(3, 10), (2, 20)]
