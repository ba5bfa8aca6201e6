"""The fixtures of tests/kernels."""

from tests.kernels.conftest import device, pytest_collection_modifyitems, small_tiles

__all__ = ["device", "pytest_collection_modifyitems", "small_tiles"]
