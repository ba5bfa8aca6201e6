"""Gradients of gradients are refused by kernels as by the other backends."""

import pytest

from tests.calls.test_second_order import CALLS, assert_refused


@pytest.mark.parametrize("call", CALLS)
def test_they_are_refused(call, device):
    assert_refused(call, "triton", device)
