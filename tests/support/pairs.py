"""Few combinations of many choices: every pair of choices occurs in one of them."""

import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest

_TRIES = 8

_Choice = tuple[int, int]  # positions of a name and of its value
_Pair = tuple[_Choice, _Choice]


def pairwise(free: Iterable[tuple[str, str]] = (), **choices: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize a test with few combinations of the arguments' values: every pair of values occurs in one.

    free   pairs of names, in the order of the choices, whose values need not all meet
    """
    every = all_pairs({name: list(values) for name, values in choices.items()})
    rows = [tuple(row.values()) for row in (thinned(every, free) if free else every)]
    return pytest.mark.parametrize(tuple(choices), rows, ids=["-".join(map(str, row)) for row in rows])


def in_turn(**choices: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize a test so that every value occurs: as many combinations as the longest choice has values."""
    values = [list(one) for one in choices.values()]
    rows = [tuple(one[at % len(one)] for one in values) for at in range(max(map(len, values)))]
    rows = list({str(row): row for row in rows}.values())
    return pytest.mark.parametrize(tuple(choices), rows, ids=["-".join(map(str, row)) for row in rows])


def all_pairs(choices: Mapping[str, Sequence[Any]], first: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """Combinations, one value of each of `choices` in every one, that hold every pair of values of different names.

    Always the same ones. They begin with `first`, whose missing choices are filled in. Each is the best of a few that
    are put together greedily, value by value, by how many new pairs they hold.
    """
    names, values = list(choices), list(choices.values())
    sizes = [len(one) for one in values]
    generator, rows = random.Random(0), []
    missing: set[_Pair] = {
        ((a, x), (b, y))
        for a, b in combinations(range(len(sizes)), 2)
        for x, y in product(range(sizes[a]), range(sizes[b]))
    }
    given = [{names.index(name): list(choices[name]).index(value) for name, value in row.items()} for row in first]
    while given or missing:
        start = given.pop(0) if given else dict(min(missing))
        tries = [_filled(start, sizes, missing, generator) for _ in range(_TRIES)]
        best = max(tries, key=lambda row: len(missing & _pairs(row)))
        missing -= _pairs(best)
        rows.append(best)
    return [{name: values[at][row[at]] for at, name in enumerate(names)} for row in rows]


def thinned(rows: Sequence[dict[str, Any]], free: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """As few of the rows as hold every pair of values that they hold; values of names in `free` need not all meet."""
    pairs = [{(a, str(row[a]), b, str(row[b])) for a, b in combinations(row, 2) if (a, b) not in free} for row in rows]
    missing, kept = set().union(*pairs), []
    while missing:
        best = max(range(len(rows)), key=lambda at: len(missing & pairs[at]))
        missing -= pairs[best]
        kept.append(best)
    return [rows[at] for at in sorted(kept)]


def _filled(
    start: Mapping[int, int], sizes: list[int], missing: set[_Pair], generator: random.Random
) -> dict[int, int]:
    row = dict(start)
    left = [at for at in range(len(sizes)) if at not in row]
    generator.shuffle(left)
    for at in left:
        numbers = list(range(sizes[at]))
        generator.shuffle(numbers)
        row[at] = max(numbers, key=lambda number: sum(_pair(one, (at, number)) in missing for one in row.items()))
    return row


def _pairs(row: Mapping[int, int]) -> set[_Pair]:
    return {_pair(one, two) for one, two in combinations(row.items(), 2)}


def _pair(one: _Choice, two: _Choice) -> _Pair:
    return (one, two) if one < two else (two, one)
