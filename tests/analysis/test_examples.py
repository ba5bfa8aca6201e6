"""The examples in the docstrings."""

from __future__ import annotations

import doctest
import sys

import pytest

import tritonattn.analysis


@pytest.mark.parametrize("module", ["advise", "diagnosis", "monitor", "qk_clip"])
def test_the_examples_in_the_docstrings(module):
    result = doctest.testmod(sys.modules[f"{tritonattn.analysis.__name__}.{module}"])
    assert result.attempted >= 3
    assert result.failed == 0
