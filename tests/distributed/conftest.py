"""The pool of processes. This folder runs without xdist: `make test` does so."""

from collections.abc import Iterator

import pytest

from .pool import Pool

RANKS = 4


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    ranks = Pool(RANKS)
    yield ranks
    ranks.close()
