"""The models that the study trains, the most telling first, and the changes at test that each is tried with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .model import Factor, Shape, Swap
from .training import Cell, Recipe

SQRT, LOG, SSMAX = Factor(), Factor("log_key_count"), Factor("ssmax")
TWICE, FOUR_TIMES = Factor(gain=2.0), Factor(gain=4.0)
LEDGER = Recipe()
MUON = replace(LEDGER, optimizer="muon", rate=3e-3)
TEXT = Recipe(optimizer="muon", rate=2e-3, batch=16, target=None, cap=600, cool=200, precision="bf16")
LONGER = replace(TEXT, cap=900, cool=300)


def _cells(task: str, recipe: Recipe, seeds: range, *shapes: Shape) -> Iterator[Cell]:
    """Seed by seed, so that a study that is stopped has every model as often."""
    for seed in seeds:
        for shape in shapes:
            yield Cell(task, shape, recipe, seed)


def _each(shape: Shape, *factors: Factor) -> tuple[Shape, ...]:
    return tuple(replace(shape, factor=factor) for factor in factors)


def study() -> list[Cell]:
    """All cells, in the order in which they are trained."""
    plain, rotary, partly = Shape("wn"), Shape("wr"), Shape("wp")
    gain, none = replace(plain, qk_norm="gain"), replace(plain, qk_norm="none")
    everywhere, wide = replace(plain, where="all"), replace(plain, window=16)
    text = Shape("wnwn", qk_norm="gain", window=16)
    wider, rotary_text = replace(text, width=128), replace(text, layers="rrrr")
    others = (*_each(none, SQRT, LOG), *_each(rotary, SQRT, LOG), *_each(everywhere, LOG))
    first = range(1)
    groups = (
        _cells("ledger", LEDGER, range(5), *_each(plain, SQRT, LOG, SSMAX, TWICE, FOUR_TIMES)),
        _cells("ledger", LEDGER, range(3), *_each(gain, SQRT, LOG)),
        _cells("code", TEXT, range(5), *_each(text, SQRT, LOG, SSMAX)),
        _cells("code", LONGER, first, *_each(wider, SQRT, LOG, SSMAX)),
        _cells("code", TEXT, first, *_each(rotary_text, SQRT, LOG)),
        _cells("ledger", LEDGER, range(5), *others),
        _cells("ledger", LEDGER, range(3, 5), *_each(gain, SQRT, LOG)),
        _cells("ledger", LEDGER, range(5), *_each(gain, SSMAX, TWICE)),
        _cells("ledger", MUON, range(5), *_each(plain, SQRT, LOG)),
        _cells("code", TEXT, range(1, 5), *_each(rotary_text, SQRT, LOG)),
        _cells("code", LONGER, range(1, 5), *_each(wider, SQRT, LOG, SSMAX)),
        _cells("ledger", LEDGER, range(5), *_each(wide, SQRT, LOG)),
        _cells("ledger", LEDGER, range(5), *_each(partly, SQRT, LOG)),
    )
    return [cell for group in groups for cell in group]


LOG_AT_TEST = Factor("qwen_logn")
CHANGES = {
    "log n at test": LOG_AT_TEST,
    "twice at test": TWICE,
    "four times at test": FOUR_TIMES,
}


def swaps_of(cell: Cell) -> tuple[Swap, ...]:
    """A model trained with 1/sqrt(D) is tried with other factors; rotary layers over all keys with a stretched base."""
    changes = CHANGES if cell.shape.factor == SQRT and cell.shape.where == "global" else {}
    found = [Swap(), *(Swap(name, factor) for name, factor in changes.items())]
    if {"r", "p"} & {*cell.shape.layers}:
        found.append(Swap("base stretched", stretch=True))
        if changes:
            found.append(Swap("base stretched, log n at test", LOG_AT_TEST, stretch=True))
    return tuple(found)
