"""Training runs as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

from ...core.tables import table
from ...nn.power_law import POINTS
from .interval import Interval
from .records import Recipe, Run
from .tasks import TASKS

BASELINE = "sqrt_dim"
_MISSING = "-"


def by_mode(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Group runs by mode, in the order in which modes appear, the baseline first."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.mode, []).append(run)
    return dict(sorted(found.items(), key=lambda item: item[0] != BASELINE))


def comparison(runs: Sequence[Run]) -> str:
    """Tabulate one task's runs with one recipe, a row a mode: means over seeds with 95% intervals.

    "against sqrt_dim" is the mean over seeds of the difference of two runs that began with the same weights and saw the
    same data; a star where its interval excludes 0.
    """
    task = TASKS[runs[0].task]
    modes = by_mode(runs)
    base = {run.seed: run for run in modes.get(BASELINE, [])}
    rows = []
    for mode, members in modes.items():
        good = [run for run in members if run.status == "trained"]
        rows.append(
            (
                mode,
                _mean(good, lambda run: run.metrics[task.metric]),
                _MISSING if mode == BASELINE else _difference(good, base, lambda run: run.metrics[task.metric]),
                _mean(good, lambda run: run.held_out_loss[-1]),
                _target(members),
                _mean(good, lambda run: _average(run.entropy), 2),
                _mean(good, lambda run: _average(run.gradients, " qk"), 4),
                _MISSING if len(good) == len(members) else f"{len(members) - len(good)} of {len(members)}",
            )
        )
    headers = (
        "mode",
        task.metric,
        f"against {BASELINE}",
        "held-out loss",
        f"steps to loss {task.target:g}",
        "entropy / ln n",
        "gradient of q, k",
        "diverged",
    )
    return table(rows, headers)


def other_metrics(runs: Sequence[Run]) -> str:
    """Tabulate the task's other measures, a row a mode; empty where it has none."""
    task = TASKS[runs[0].task]
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    if names in ([], [task.metric]):
        return ""
    rows = []
    for mode, members in by_mode(runs).items():
        good = [run for run in members if run.status == "trained"]
        rows.append((mode, *(_mean(good, lambda run, name=name: run.metrics[name]) for name in names)))
    return table(rows, ("mode", *names))


def exponents(runs: Iterable[Run]) -> str:
    """Tabulate PowerLaw's exponents, a row a layer: mean over heads and seeds, range, and the nearest named mode."""
    rows = []
    members = [run for run in runs if run.mode == "power_law" and run.status == "trained"]
    for task, group in groupby(sorted(members, key=lambda run: run.task), key=lambda run: run.task):
        same = list(group)
        for layer in same[0].scaling:
            values = {name: [x for run in same for x in run.scaling[layer][name]] for name in same[0].scaling[layer]}
            n, rho = values["count_exponent"], values["length_exponent"]
            nearest, distance = nearest_point(sum(n) / len(n), sum(rho) / len(rho))
            rows.append((task, layer, _spread(n), _spread(rho), _spread(values["theta"]), nearest, f"{distance:.2f}"))
    headers = ("task", "layer", "exponent of n", "of mean norm", "theta", "nearest mode", "distance")
    return table(rows, headers) if rows else ""


def nearest_point(count_exponent: float, length_exponent: float) -> tuple[str, float]:
    """Find the named mode whose exponents of n and of the mean norm are nearest, and its distance.

    Modes that differ by a constant only ("dim", "none") count as "sqrt_dim".
    """
    best = BASELINE, float("inf")
    for name, (_, b, c) in POINTS.items():
        distance = ((b - count_exponent) ** 2 + (c - length_exponent) ** 2) ** 0.5
        if distance < best[1]:
            best = name, distance
    return best


def grid(runs: Sequence[Run]) -> str:
    """Tabulate one task's runs, a row a recipe, a column a mode: the metric's mean over seeds."""
    task = TASKS[runs[0].task]
    modes = by_mode(runs)
    recipes: dict[Recipe, None] = dict.fromkeys(run.recipe for run in runs)
    rows = []
    for recipe in recipes:
        cells = []
        for members in modes.values():
            same = [run for run in members if run.recipe == recipe]
            good = [run for run in same if run.status == "trained"]
            lost = f" ({len(same) - len(good)} of {len(same)} diverged)" if len(good) < len(same) else ""
            cells.append(_mean(good, lambda run: run.metrics[task.metric]) + lost)
        rows.append((recipe.optimizer, f"{recipe.learning_rate:g}", f"{recipe.weight_decay:g}", *cells))
    return table(rows, ("optimizer", "learning rate", "weight decay", *modes))


def best_recipes(runs: Sequence[Run]) -> str:
    """Name the best recipe of every mode in a grid, a sentence each."""
    task = TASKS[runs[0].task]
    sentences = []
    for mode, members in by_mode(runs).items():
        means = {}
        for recipe in dict.fromkeys(run.recipe for run in members):
            same = [run for run in members if run.recipe == recipe]
            if all(run.status == "trained" for run in same):
                means[recipe] = sum(run.metrics[task.metric] for run in same) / len(same)
        if means:
            choose = max if task.higher_is_better else min
            recipe = choose(means, key=means.__getitem__)
            sentences.append(f"{mode} is best with {recipe}: {task.metric} {means[recipe]:.3f}.")
    return "\n".join(sentences)


def _mean(runs: Sequence[Run], value: Callable[[Run], float], digits: int = 3) -> str:
    return Interval.of([value(run) for run in runs]).text(digits) if runs else _MISSING


def _difference(runs: Sequence[Run], base: dict[int, Run], value: Callable[[Run], float]) -> str:
    pairs = [(run, base[run.seed]) for run in runs if run.seed in base and base[run.seed].status == "trained"]
    if not pairs:
        return _MISSING
    interval = Interval.of([value(run) - value(other) for run, other in pairs])
    return interval.text(sign="+") + " *" * interval.excludes_zero


def _target(runs: Sequence[Run]) -> str:
    reached = [run.steps_to_target for run in runs if run.steps_to_target is not None]
    if not reached:
        return "never"
    mean = f"{sum(reached) / len(reached):.0f}"
    return mean if len(reached) == len(runs) else f"{mean} ({len(reached)} of {len(runs)})"


def _average(lists: dict[str, list[float]], ending: str = "") -> float:
    """Average the last value over layers."""
    values = [one[-1] for name, one in lists.items() if name.endswith(ending)]
    return sum(values) / len(values)


def _spread(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):+.2f} ({min(values):+.2f} to {max(values):+.2f})"
