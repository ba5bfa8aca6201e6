"""Inductor, and the longest compilations, over the public functions and generating models."""

from functools import partial

import pytest
import torch

pytest.importorskip("transformers")
import tritonattn
from tests.calls.test_compile import (
    assert_same_gradients,
    check_packed_sequences_of_any_lengths,
    objective,
    operands,
)
from tests.calls.test_compile import pytestmark as _filters
from tests.huggingface.test_generation import assert_a_compiled_static_step
from tests.ops.test_decode import _grown
from tests.support.packed import Packed, offsets, packed_operands

pytestmark = _filters


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def test_inductor():
    function = partial(objective, scaling="key_norm_max", window=(3, 0))
    assert_same_gradients(torch.compile(function, fullgraph=True), function, operands())


def test_sums_over_packed_sequences_of_any_lengths():
    check_packed_sequences_of_any_lengths("key_norm_mean")


def test_inductor_of_packed_sequences():
    """One tensor has the offsets of rows and of keys."""
    packed = Packed((3, 4), (3, 4))
    ends, leaves = offsets((3, 4)), [x.detach() for x in packed_operands(packed, torch.float32).values()]
    function = partial(tritonattn.attention_varlen, scaling="key_count", causal=True)
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(*leaves, ends, ends, 4, 4), function(*leaves, ends, ends, 4, 4))


def test_inductor_of_a_decode_step():
    query, cache = _grown(16)
    arguments = {"scaling": "key_norm_l2", **cache.arguments()}
    found = torch.compile(lambda query: tritonattn.attention_decode(query, **arguments), fullgraph=True)(query)
    torch.testing.assert_close(found, tritonattn.attention_decode(query, **arguments))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_compiled_static_step():
    assert_a_compiled_static_step("gemma3", "key_norm_mean")
