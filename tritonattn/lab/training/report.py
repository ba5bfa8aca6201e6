"""Training runs as tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from ...core.tables import table
from ...nn.power_law import POINTS
from .records import Run
from .tasks import TASKS

BASELINE = "sqrt_dim"
_MISSING = "-"


@dataclass(frozen=True)
class Interval:
    """mean +- half: a confidence interval of the mean of normally distributed values.

        half = t * s / sqrt(n)

    t is the quantile of Student's t with n - 1 degrees of freedom, s the sample's standard deviation; half is infinite
    for a single value.
    """

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float], confidence: float = 0.95) -> Interval:
        """Compute the interval of at least one value."""
        from scipy import stats  # not among the packages of the demo, which trains too

        n, mean = len(values), fmean(values)
        if n == 1:
            return cls(mean, math.inf)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1))  # NaN where a value is
        return cls(mean, float(stats.t.ppf((1 + confidence) / 2, n - 1)) * deviation / math.sqrt(n))

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half

    def text(self, digits: int = 3, sign: str = "") -> str:
        half = "?" if math.isinf(self.half) else f"{self.half:.{digits}f}"
        return f"{self.mean:{sign}.{digits}f} ± {half}"


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
    task, modes = TASKS[runs[0].task], by_mode(runs)
    base = {run.seed: run.metrics[task.metric] for run in _trained(modes.get(BASELINE, []))}
    rows = []
    for mode, group in modes.items():
        good, lost = _trained(group), len(group) - len(_trained(group))
        moved = [run.metrics[task.metric] - base[run.seed] for run in good if mode != BASELINE and run.seed in base]
        row = {
            "mode": mode,
            task.metric: _mean(good, lambda run: run.metrics[task.metric]),
            f"against {BASELINE}": _difference(moved),
            "held-out loss": _mean(good, lambda run: run.held_out_loss[-1]),
            f"steps to loss {task.target:g}": _target(group),
            "entropy / ln n": _mean(good, lambda run: _average(run.entropy), 2),
            "gradient of q, k": _mean(good, lambda run: _average(run.gradients, " qk"), 4),
            "diverged": f"{lost} of {len(group)}" if lost else _MISSING,
        }
        rows.append(row)
    return table([list(row.values()) for row in rows], list(rows[0]))


def other_metrics(runs: Sequence[Run]) -> str:
    """Tabulate the task's other measures, a row a mode; empty where it has none."""
    task = TASKS[runs[0].task]
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    if names in ([], [task.metric]):
        return ""
    rows = []
    for mode, group in by_mode(runs).items():
        good = _trained(group)
        rows.append((mode, *(_mean(good, lambda run, name=name: run.metrics[name]) for name in names)))
    return table(rows, ("mode", *names))


def exponents(runs: Iterable[Run]) -> str:
    """Tabulate PowerLaw's exponents, a row a layer: mean over heads and seeds, range, and the nearest named mode."""
    by_task: dict[str, list[Run]] = {}
    for run in _trained(runs):
        if run.mode == "power_law":
            by_task.setdefault(run.task, []).append(run)
    rows = []
    for task, same in sorted(by_task.items()):
        for layer in same[0].scaling:
            values = {name: [x for run in same for x in run.scaling[layer][name]] for name in same[0].scaling[layer]}
            n, norm, theta = values["count_exponent"], values["length_exponent"], values["theta"]
            nearest, distance = nearest_point(fmean(n), fmean(norm))
            rows.append((task, layer, _spread(n), _spread(norm), _spread(theta), nearest, f"{distance:.2f}"))
    headers = ("task", "layer", "exponent of n", "of mean norm", "theta", "nearest mode", "distance")
    return table(rows, headers) if rows else ""


def nearest_point(count_exponent: float, norm_exponent: float) -> tuple[str, float]:
    """Find the named mode whose exponents of n and of the mean norm are nearest, and its distance.

    Modes that differ by a constant only ("dim", "none") count as "sqrt_dim".
    """
    apart = {name: math.dist((b, c), (count_exponent, norm_exponent)) for name, (_, b, c) in POINTS.items()}
    return min({BASELINE: apart[BASELINE], **apart}.items(), key=lambda item: item[1])


def grid(runs: Sequence[Run]) -> str:
    """Tabulate one task's runs, a row a recipe, a column a mode: the metric's mean over seeds."""
    task, modes = TASKS[runs[0].task], by_mode(runs)
    rows = []
    for recipe in dict.fromkeys(run.recipe for run in runs):
        cells = []
        for group in modes.values():
            same = [run for run in group if run.recipe == recipe]
            lost = len(same) - len(_trained(same))
            mean = _mean(_trained(same), lambda run: run.metrics[task.metric])
            cells.append(mean + (f" ({lost} of {len(same)} diverged)" if lost else ""))
        rows.append((recipe.optimizer, f"{recipe.learning_rate:g}", f"{recipe.weight_decay:g}", *cells))
    return table(rows, ("optimizer", "learning rate", "weight decay", *modes))


def best_recipes(runs: Sequence[Run]) -> str:
    """Name the best recipe of every mode in a grid, a sentence each."""
    task = TASKS[runs[0].task]
    choose, sentences = max if task.higher_is_better else min, []
    for mode, group in by_mode(runs).items():
        recipes = dict.fromkeys(run.recipe for run in group)
        of_recipes = {recipe: [run for run in group if run.recipe == recipe] for recipe in recipes}
        means = {
            recipe: fmean(run.metrics[task.metric] for run in same)
            for recipe, same in of_recipes.items()
            if len(_trained(same)) == len(same)
        }
        if means:
            recipe = choose(means, key=means.__getitem__)
            sentences.append(f"{mode} is best with {recipe}: {task.metric} {means[recipe]:.3f}.")
    return "\n".join(sentences)


def _trained(runs: Iterable[Run]) -> list[Run]:
    return [run for run in runs if run.status == "trained"]


def _mean(runs: Sequence[Run], value: Callable[[Run], float], digits: int = 3) -> str:
    return Interval.of([value(run) for run in runs]).text(digits) if runs else _MISSING


def _difference(values: Sequence[float]) -> str:
    if not values:
        return _MISSING
    interval = Interval.of(values)
    return interval.text(sign="+") + " *" * interval.excludes_zero


def _target(runs: Sequence[Run]) -> str:
    reached = [run.steps_to_target for run in runs if run.steps_to_target is not None]
    if not reached:
        return "never"
    mean = f"{fmean(reached):.0f}"
    return mean if len(reached) == len(runs) else f"{mean} ({len(reached)} of {len(runs)})"


def _average(lists: dict[str, list[float]], ending: str = "") -> float:
    return fmean(one[-1] for name, one in lists.items() if name.endswith(ending))


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):+.2f} ({min(values):+.2f} to {max(values):+.2f})"
