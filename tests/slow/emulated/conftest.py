"""The fixture of tests/emulated."""

from tests.emulated.conftest import emulate

__all__ = ["emulate"]
