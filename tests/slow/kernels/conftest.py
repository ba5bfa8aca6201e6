"""The fixtures of tests/kernels."""

from __future__ import annotations

from tests.kernels.conftest import device, pytest_collection_modifyitems, small_tiles

__all__ = ["device", "pytest_collection_modifyitems", "small_tiles"]
