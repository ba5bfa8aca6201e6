"""attention_varlen against one call for every sequence alone: modes, forms, gradients, edges."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tritonattn
from tests.kernels import harness
from tests.support.packed import RAGGED, Packed, one_by_one, packed_operands
from tests.support.pairs import pairwise
from tritonattn.backends.cpu import tiles
from tritonattn.core.dropout import Dropout
from tritonattn.core.sequences import Sequences
from tritonattn.core.statistics import max_over_keys, sum_over_keys
from tritonattn.core.visibility import Visibility
from tritonattn.scaling import SCALINGS

BACKENDS = ("sdpa", "reference")
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "causal window": {"causal": True, "window": (1, None)},
}


FORMS = (
    *("gain", "gain, softcap, sinks", "gain of rows, softcap, sinks"),
    *("biases of keys", "biases of distances", "biases of distances of rows"),
)


def outcome(attend, leaves: dict[str, Tensor], **arguments) -> dict[str, Tensor]:
    """out, aux and the gradient of every leaf, under gradients of out and lse."""
    q, v = leaves["q"], leaves["v"]
    d_out = torch.linspace(-1, 1, q.shape[0] * q.shape[1] * v.shape[2], dtype=torch.float64)
    return harness.run(leaves, d_out.view(*q.shape[:2], v.shape[2]), attend, **arguments)


def ours(packed: Packed, backend: str):
    arguments = packed.arguments() | {"max_seqlen_q": 1000, "max_seqlen_k": 1000}  # longer than the longest
    return partial(tritonattn.attention_varlen, **arguments, return_aux=True, backend=backend)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    for name, expected in wanted.items():
        assert found[name].shape == expected.shape, name
        torch.testing.assert_close(found[name], expected, rtol=tolerance, atol=tolerance, msg=name)


@pairwise(scaling=SCALINGS, mask=MASKS, backend=BACKENDS, form=FORMS)
def test_every_sequence_is_as_if_alone(scaling, mask, backend, form):
    leaves, arguments = packed_operands(RAGGED), {"scaling": scaling, **MASKS[mask]}
    leaves["gain"] = torch.rand(4, RAGGED.q_len if "rows" in form else 1, dtype=torch.float64, requires_grad=True)
    if "sinks" in form:
        shape = (4, RAGGED.q_len) if "rows" in form else (4,)
        leaves["sinks"] = torch.randn(shape, dtype=torch.float64).requires_grad_()
        arguments["softcap"] = 1.5
    if "keys" in form:
        leaves["key_bias"] = torch.randn(4, RAGGED.k_len, dtype=torch.float64).requires_grad_()
    if "distances" in form:
        rows = RAGGED.q_len if "rows" in form else 1
        leaves["relative_bias"] = torch.randn(4, rows, 6, dtype=torch.float64).requires_grad_()
        arguments["relative_right"] = 2
    assert_same(
        outcome(ours(RAGGED, backend), leaves, **arguments), outcome(partial(one_by_one, RAGGED), leaves, **arguments)
    )


@pytest.mark.parametrize("values", ["read", "not read"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_groups_the_keys_of_each_packed_sequence(backend, values, monkeypatch):
    """The kept pairs, from weights that unit vectors as values give out."""
    if values == "not read":
        monkeypatch.setattr(tiles, "readable", lambda device: False)
    monkeypatch.setattr(tiles, "KEYS", 4)
    packed = Packed((3, 5, 4), (3, 14, 7))
    q, k, _ = packed_operands(packed).values()
    unit = torch.eye(24, dtype=q.dtype)[:, None].expand(-1, k.shape[1], -1)
    torch.manual_seed(3)
    weights = tritonattn.attention_varlen(q, k, unit, **packed.arguments(), dropout_p=0.4, backend=backend)
    torch.manual_seed(3)
    first = torch.tensor([0, 3, 17]).repeat_interleave(torch.tensor(packed.q_lengths))
    kept = Dropout.draw(0.4, torch.device("cpu")).tile((1, q.shape[1]), slice(0, 12), slice(0, 24), first)
    assert torch.equal((weights != 0).transpose(0, 1), kept[0] & packed.visible())


@pytest.mark.parametrize(
    ("held", "starts"),
    [
        ([0, 3, 7, 9], [0, 3, 7, 9]),
        ([0, 7, 3, 9], [0, 7, 7, 9]),
        ([5, -4, 3, 2**31 - 1], [0, 0, 3, 9]),
        ([0, 2**31 - 1, 0, 0], [0, 9, 9, 9]),
        ([-(2**31)], [0]),
        ([4, 2], [0, 2]),
        ([0, 7, 3], [0, 7, 7]),
    ],
)
def test_offsets_that_nobody_read_are_put_in_order(held, starts):
    held = torch.tensor(held, dtype=torch.int32)
    sequences = Sequences.of(held, held.clone(), 9, 9, 9, 9)
    assert sequences.q_starts.tolist() == sequences.k_starts.tolist() == starts
    assert sequences.q_starts.dtype == torch.int32
    both = Sequences.of(held, held, 9, 6, 9, 9)  # one tensor, held to rows and keys apart
    assert (both.q_starts.tolist(), both.k_starts.tolist()) == (starts, [min(start, 6) for start in starts])
    lo, hi = Visibility(1, 1, 1, 9, 9, held.device, 0, 0, sequences=sequences).ranges()
    assert ((0 <= lo) & (lo <= hi) & (hi <= 9)).all()


lengths = st.integers(0, 6)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    lengths_of=st.lists(st.tuples(lengths, lengths), max_size=5),
    tails=st.tuples(lengths, lengths),
    causal=st.booleans(),
    window=st.tuples(st.none() | lengths, st.none() | lengths),
)
def test_rows_attend_to_the_keys_of_their_sequence(lengths_of, tails, causal, window):
    packed = Packed(tuple(q for q, _ in lengths_of), tuple(k for _, k in lengths_of), *tails)
    dense = packed.visible(causal, window)
    q, k = torch.empty(1, 2, packed.q_len, 1), torch.empty(1, 1, packed.k_len, 1)
    given = packed.arguments()
    sequences = Sequences.of(given["cu_seqlens_q"], given["cu_seqlens_k"], packed.q_len, packed.k_len, 6, 6)
    visibility = Visibility.of(q, k, causal=causal, window=window, sequences=sequences)
    x = torch.rand(1, 1, packed.k_len, dtype=torch.float64)
    shown = torch.where(dense, x, 0)
    assert torch.equal(visibility.dense()[0, 0], dense)
    assert torch.equal(visibility.counts()[0, 0], dense.sum(-1).double())
    assert torch.equal(visibility.seen_keys()[0, 0], dense.any(0))
    torch.testing.assert_close(sum_over_keys(x, visibility)[0], shown.sum(-1), rtol=1e-12, atol=1e-12)
    assert torch.equal(max_over_keys(x, visibility)[0], torch.nn.functional.pad(shown, (0, 1)).amax(-1))
    assert not visibility.is_full
    assert not visibility.is_square_causal
    assert not visibility.every_row_attends
