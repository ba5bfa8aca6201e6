"""The stub of NVIDIA's driver, for its tests."""

from __future__ import annotations

import pytest

from tests.support.versions import skip_without_stub


@pytest.fixture
def stub():
    """The stub of this process; enter `stub.active(capability)` to launch."""
    skip_without_stub()
    from tests.stub import installed

    return installed()
