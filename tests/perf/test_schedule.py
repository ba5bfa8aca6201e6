"""The model of the order of programs."""

import pytest

from perf import schedule


@pytest.mark.parametrize("gpu", ["h100", "b200", "a100", "mi300x"])
def test_sections_end_as_early_as_longest_first(gpu):
    """Within 3 %, where head after head takes up to 1.4 to 2 times as long; also of heads that dies do not divide."""
    shapes = [(length, heads) for length in (1024, 4096) for heads in (8, 17, 20, 48, 71, 128)]
    found = [schedule.row(schedule.Case(gpu, 128, *shape)) for shape in shapes]
    assert max(one.in_sections for one in found) <= 1.03
    assert max(one.by_head for one in found) > 1.4
