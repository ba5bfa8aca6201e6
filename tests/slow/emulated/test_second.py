"""The rest of the derivatives beyond the first that run in the emulator."""

import pytest

from tests.emulated.test_second import OTHERS, check, pytestmark

__all__ = ["pytestmark"]


@pytest.mark.parametrize("name", OTHERS)
def test_derivatives(name, emulate):
    check(emulate, *OTHERS[name])
