"""Training runs as tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from tabulate import tabulate

from tritonattn.core.records import FIGURES
from tritonattn.lab.modes import BASELINE
from tritonattn.nn.power_law import POINTS

from .records import Recipe, Run, grouped
from .tasks import TASKS

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
    return dict(sorted(grouped(runs, lambda run: run.mode).items(), key=lambda item: item[0] != BASELINE))


def tables(runs: Sequence[Run], *, grid: bool, quick: bool) -> str:
    """Write the tables of runs: for a grid one a task, with a row a recipe."""
    parts = ["A smoke run (--quick): too few steps for any figure here to mean anything."] if quick else []
    for name, same in grouped(runs, lambda run: run.subject).items():
        about = f"{len({run.seed for run in same})} seeds; {same[0].environment}; `{same[0].command}`"
        if grid:
            parts += [f"## {name}, grid\n\n{about}.", *_grid(same)]
        else:
            parts += [f"## {name}\n\n{same[0].recipe}; {about}.", _comparison(same), other_metrics(same)]
    parts.append("" if grid else _exponents(runs))
    return "\n\n".join(filter(None, parts))


def _comparison(runs: Sequence[Run]) -> str:
    """Tabulate one task's runs with one recipe, a row per mode: means over seeds with 95% intervals.

    "against sqrt_dim" is the mean over seeds of the difference of two runs that began with the same weights and saw the
    same data; a star where its interval excludes 0.
    """
    task, modes = TASKS[runs[0].task], by_mode(runs)
    base = {run.seed: run.metrics[task.metric] for run in _trained(modes.get(BASELINE, []))}
    rows = []
    for mode, group in modes.items():
        good = _trained(group)
        lost = len(group) - len(good)
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
    return tabulate([[*row.values()] for row in rows], list(rows[0]), "github", **FIGURES)


def other_metrics(runs: Sequence[Run]) -> str:
    """Tabulate the task's other measures, a row per mode; empty where it has none."""
    task = TASKS[runs[0].task]
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    if names in ([], [task.metric]):
        return ""
    rows = []
    for mode, group in by_mode(runs).items():
        good = _trained(group)
        rows.append((mode, *(_mean(good, lambda run, name=name: run.metrics[name]) for name in names)))
    return tabulate(rows, ("mode", *names), "github", **FIGURES)


def _exponents(runs: Iterable[Run]) -> str:
    """Tabulate PowerLaw's exponents, a row per layer: mean over heads and seeds, range, and the nearest named mode."""
    rows = []
    learned = (run for run in _trained(runs) if run.mode == "power_law")
    for task, same in sorted(grouped(learned, lambda run: run.task).items()):
        for layer, parameters in same[0].scaling.items():
            values = {name: [x for run in same for x in run.scaling[layer][name]] for name in parameters}
            n, norm, theta = values["count_exponent"], values["length_exponent"], values["theta"]
            nearest, distance = _nearest_point(fmean(n), fmean(norm))
            rows.append((task, layer, _spread(n), _spread(norm), _spread(theta), nearest, f"{distance:.2f}"))
    headers = ("task", "layer", "exponent of n", "of mean norm", "theta", "nearest mode", "distance")
    return tabulate(rows, headers, "github", **FIGURES) if rows else ""


def _nearest_point(count_exponent: float, norm_exponent: float) -> tuple[str, float]:
    """Find the named mode whose exponents of n and of the mean norm are nearest, and its distance.

    Modes that differ by a constant only ("dim", "none") count as "sqrt_dim".
    """
    apart = {name: math.dist((b, c), (count_exponent, norm_exponent)) for name, (_, b, c) in POINTS.items()}
    return min({BASELINE: apart[BASELINE], **apart}.items(), key=lambda item: item[1])


def _grid(runs: Sequence[Run]) -> tuple[str, str]:
    """Tabulate one task's runs, a row a recipe, a column a mode; and name the best recipe of every mode, a line each.

    Cells are means over seeds; a recipe with a run that diverged is never the best.
    """
    task, modes = TASKS[runs[0].task], by_mode(runs)
    cells: dict[Recipe, list[str]] = {run.recipe: [] for run in runs}
    sentences = []
    for mode, group in modes.items():
        means: dict[Recipe, float] = {}
        by_recipe = grouped(group, lambda run: run.recipe)
        for recipe, row in cells.items():
            same = by_recipe.get(recipe, [])
            good = _trained(same)
            lost = len(same) - len(good)
            mean = _mean(good, lambda run: run.metrics[task.metric])
            row.append(mean + (f" ({lost} of {len(same)} diverged)" if lost else ""))
            if good and not lost:
                means[recipe] = fmean(run.metrics[task.metric] for run in good)
        if means:
            best = (max if task.higher_is_better else min)(means, key=means.__getitem__)
            sentences.append(f"{mode} is best with {best}: {task.metric} {means[best]:.3f}.")
    rows = [(one.optimizer, f"{one.learning_rate:g}", f"{one.weight_decay:g}", *row) for one, row in cells.items()]
    headers = ("optimizer", "learning rate", "weight decay", *modes)
    return tabulate(rows, headers, "github", **FIGURES), "\n".join(sentences)


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
