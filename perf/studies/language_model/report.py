"""The study's tables: rows of cells, from the record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from .model import Factor, Shape
from .records import Run
from .training import Cell

Row = list[str]
LEDGER_HEADER = ("layers, QK-norm", "factor", "seeds", "steps", "1x", "8x", "32x", "loss, 32x")
_NEAR, _FAR = ("1", "8"), "32"  # multiples: means alone, and the spread over seeds too
_QK_NORM = {"plain": "QK-norm", "gain": "QK-norm, learned gain", "none": "no QK-norm"}
_FACTORS = {"sqrt_dim": "`sqrt_dim`", "log_key_count": "`log_key_count`", "ssmax": "`SSMax`"}


def model_of(cell: Cell) -> str:
    """The model but for its factor: what a table's first column says."""
    usual = Shape("wn")
    words = [cell.shape.layers, _QK_NORM[cell.shape.qk_norm]]
    if cell.task == "ledger":
        words += [f"window {cell.shape.window}"] * (cell.shape.window != usual.window)
        words += ["Muon"] * (cell.recipe.optimizer == "muon")
    words += [f"width {cell.shape.width}"] * (cell.shape.width != usual.width)
    return ", ".join([*words, *["factor in every layer"] * (cell.shape.where == "all")])


def factor_of(cell: Cell) -> str:
    factor = cell.shape.factor
    return _FACTORS[factor.name] + (f", {factor.gain:g} times" if factor.gain != 1 else "")


def by_model(runs: Iterable[Run], task: str) -> dict[Cell, list[Run]]:
    """Runs of a task that differ in their seed alone, by their cell with seed 0, models and then factors in turn."""
    found: dict[Cell, list[Run]] = {}
    for run in runs:
        if run.cell.task == task:
            found.setdefault(replace(run.cell, seed=0), []).append(run)
    order = list(dict.fromkeys(map(model_of, found)))
    return dict(sorted(found.items(), key=lambda item: order.index(model_of(item[0]))))


def over_seeds(values: Sequence[float], text: Callable[[float], str]) -> str:
    """The mean, and from the least to the greatest of several seeds."""
    least, mean, greatest = (text(x) for x in (min(values), fmean(values), max(values)))
    return mean if len(values) == 1 or least == greatest else f"{mean} ({least} to {greatest})"


def _rows(runs: Iterable[Run], task: str, cells: Callable[[list[Run], str], Row]) -> list[Row]:
    """A row for each model and factor, and below it one for each change of it at test."""
    rows, last = [], ""
    for cell, same in by_model(runs, task).items():
        for swap in same[0].found.results:
            model = model_of(cell)
            rows.append([model if model != last else "", swap or f"**{factor_of(cell)}**", *cells(same, swap)])
            last = model
    return rows


def _percent(x: float) -> str:
    return f"{100 * x:.1f}"


def _steps(runs: list[Run]) -> str:
    """Mean steps to the target at the full rate, and how many did not meet it."""
    met = [run.found.solved_at for run in runs if run.found.solved_at is not None]
    missed = f"{len(runs) - len(met)} of {len(runs)} not" if len(met) < len(runs) else ""
    return ", ".join(filter(None, [f"{fmean(met):.0f}" if met else "", missed]))


def ledger_rows(runs: Iterable[Run]) -> list[Row]:
    def cells(same: list[Run], swap: str) -> Row:
        results = [run.found.results[swap] for run in same]

        def at(multiple: str) -> list[float]:
            return [one[multiple]["accuracy"] for one in results if multiple in one]

        near = [_percent(fmean(found)) if (found := at(multiple)) else "" for multiple in _NEAR]
        loss = fmean(one[_FAR]["loss"] for one in results)
        steps = "" if swap else _steps(same)
        return [str(len(same)), steps, *near, over_seeds(at(_FAR), _percent), f"{loss:.2f}"]

    return _rows(runs, "ledger", cells)


def text_rows(runs: Iterable[Run]) -> tuple[list[str], list[Row]]:
    """The table's header and rows: nats by position, of others than `sqrt_dim` less those of it with the same seed."""
    runs = [run for run in runs if run.cell.task == "code"]
    bare = {run.cell: _by_position(run, "") for run in runs if run.cell.shape.factor == Factor()}
    places: list[str] = list(_by_position(runs[0], "")) if runs else []

    def cells(same: list[Run], swap: str) -> Row:
        found = [_by_position(run, swap) for run in same]
        if not swap and same[0].cell in bare:
            return [str(len(same)), *(f"{fmean(one[place] for one in found):.3f}" for place in places)]
        beside = [bare[replace(run.cell, shape=replace(run.cell.shape, factor=Factor()))] for run in same]
        more = [[one[place] - other[place] for one, other in zip(found, beside, strict=True)] for place in places]
        signed = "{:+.3f}".format
        return [str(len(same)), *(signed(fmean(one)) for one in more[:-1]), over_seeds(more[-1], signed)]

    return ["layers, QK-norm", "factor", "seeds", *places], _rows(runs, "code", cells)


def _by_position(run: Run, swap: str) -> dict[str, Any]:
    (longest,) = (run.found.results[swap][name] for name in [max(run.found.results[swap], key=int)])
    return longest["by_position"]


def sources(runs: Iterable[Run]) -> str:
    """The machine, versions and commits of the runs, and the processor time they took."""
    runs = list(runs)
    commits = " and ".join(dict.fromkeys(run.environment.commit for run in runs))
    environments = "; ".join(dict.fromkeys(f"{replace(run.environment, commit=commits)}, {run.date}" for run in runs))
    minutes = sum(run.found.cpu_seconds for run in runs) / 60
    return f"Measured: {environments}; {len(runs)} models, {minutes:.0f} minutes of one core."
