"""Distinct kernels of ordinary work: a bound for each list, so that none is compiled twice for what does not matter."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from perf.compilations import LISTS, kernels_of
from tritonattn.backends.triton import launch
from tritonattn.tuning import Target

MOST = {"training": 60, "decoding": 18, "packing": 11, "appending keys": 4}

pytestmark = pytest.mark.skipif(launch.interpreting, reason="TRITON_INTERPRET=1 leaves nothing to compile")


@pytest.mark.parametrize("name", LISTS)
def test_few_kernels_are_compiled(name):
    found = kernels_of(name, Target("cuda", "90"))
    assert sum(found.values()) <= MOST[name], found


def test_the_backend_is_as_before():
    before = launch.run
    kernels_of("appending keys", Target("cuda", "80"))
    assert launch.run is before
