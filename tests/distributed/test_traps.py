"""Under more than one process nothing is silently wrong."""

import pytest

pytest.importorskip("transformers")
from . import traps


@pytest.mark.parametrize("layers", [{0: "key_norm_max", 1: "cosine"}, {0: {"gain": 2.0}, 1: "ssmax"}])
def test_a_patched_model_attends_to_the_whole_sequence_under_torchs_context_parallel(pool, layers):
    assert max(pool.run(traps.logits_in_context_parallel, layers)) < 2e-6


def test_what_would_be_silently_wrong_is_refused(pool):
    pool.run(traps.refusals)
