"""The fixture of tests/emulated."""

from __future__ import annotations

from tests.emulated.conftest import emulate, pytest_collection_modifyitems

__all__ = ["emulate", "pytest_collection_modifyitems"]
