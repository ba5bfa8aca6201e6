"""The fixture of tests/emulated."""

from __future__ import annotations

from tests.emulated.conftest import emulate

__all__ = ["emulate"]
