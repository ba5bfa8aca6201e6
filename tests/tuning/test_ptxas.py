"""The version of ptxas in records, and the versions that a user is warned of."""

import re

import pytest

pytest.importorskip("triton")

from tritonattn.tuning.ptxas import ptxas_version, suspicion


def test_the_version_is_that_of_the_card():
    assert all(re.fullmatch(r"1\d\.\d+\.\d+", ptxas_version(capability)) for capability in (80, 100))


def test_versions_known_for_wrong_code():
    assert all("TRITON_PTXAS_PATH" in suspicion(version) for version in ("12.8.61", "12.8.93", "13.0.88"))
    assert not any(map(suspicion, ("12.9.86", "13.1.80", "13.5.37", "unknown")))
