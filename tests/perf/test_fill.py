"""Models of a card's programs: in which order they end first, and how full calls of few programs make it."""

import pytest

from perf.models import fill

FULL = 0.9


@pytest.mark.parametrize("card", fill.CARDS)
def test_few_rows_fill_a_card(card):
    """From 17 to 1,024 rows over 8,192 to 131,072 keys: where less is full, any count that fills more ends no earlier.

    Unsplit, a twelfth to a quarter is full at up to 128 rows.
    """
    target = fill.target_of(card)
    config = fill.config_of("forward", 128, target)
    least = {}
    for keys in (8192, 16384, 65536, 131072):
        for rows in (17, 128, 200, 512, 900, 1024):
            before, after = fill.forward(rows, keys, config, target)
            least[keys] = min(least.get(keys, 1.0), after.share)
            assert after.end <= before.end
            if after.share < FULL:
                others = (fill.of_keys(rows, keys, count, config, target) for count in range(1, 17))
                assert all(other.end >= 0.99 * after.end for other in others if other.share >= FULL), (rows, keys)
            if rows <= 128:
                assert before.share < 0.25 < 0.85 < after.share
    assert min(least[65536], least[131072]) >= FULL
    assert min(least.values()) >= 0.79
    before, after = fill.gradients(2048, 1, True, fill.config_of("grad_key_value", 128, target), target)
    assert before.share < 0.2 < FULL <= after.share
