"""A mini-model trained through the CPU path follows the reference's loss curve in every mode until it has learned."""

import pytest

from tests.calls.test_convergence import assert_follows
from tests.support.convergence import MODES


@pytest.mark.parametrize("mode", MODES)
def test_the_cpu_path_follows_the_reference_until_it_has_learned(mode):
    assert_follows(mode, 40)
