"""Training with each scaling: the `tritonattn train-compare` command."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path

from ...core.errors import CommandError
from ...core.progress import Progress
from ...core.provenance import Environment, command_line
from ...core.records import append, write
from ..modes import MODES, check_mode, trained_and_tested
from .records import Recipe, Run, grouped, read
from .report import tables
from .tasks import TASKS
from .trainer import train

_QUICK_STEPS, _QUICK_SEEDS, _SEEDS, _GRID_SEEDS = 6, 2, 5, 2
_GRID = {
    "adamw": ((1e-3, 3e-3, 1e-2), (0.0, 0.1)),
    "sgd": ((0.03, 0.1, 0.3), (0.0, 1e-3)),
}
GRID_MODES = ("sqrt_dim", "key_norm_sum+gain")


def run(options: Namespace) -> int:
    """Train the runs that the folder lacks, print and write the tables, draw the plots; --report trains none.

    Returns 0, or 1 where the data of two modes differed.
    """
    stem = "grid" if options.grid else "runs"
    files = {name: options.out / f"{stem}-{name}.jsonl" for name in options.tasks}
    runs = _recorded(files, options) if options.report else _trained(files, options)
    text = tables(runs, grid=options.grid, quick=options.quick)
    print(text)
    write(options.out / f"{stem}.md", text + "\n")
    if not options.grid:
        from ..figures import save
        from .plot import figure_of

        for name, same in grouped(runs, lambda run: run.subject).items():
            file = options.out / f"{name.replace(', ', '-').replace(' ', '-')}.png"
            save(figure_of(same), file)
            print(f"plot: {file}", file=sys.stderr)
    return 0 if _same_data(runs) else 1


def checked_modes(options: Namespace) -> tuple[str, ...]:
    """Return the modes of --modes, or the default ones, each once. Raises CommandError for a wrong option."""
    unknown = [name for name in options.tasks if name not in TASKS]
    if unknown or not options.tasks:
        got = ", ".join(map(repr, unknown)) if unknown else "nothing"
        raise CommandError(f"--tasks: expected names out of {', '.join(TASKS)}, got {got}")
    modes = tuple(dict.fromkeys(options.modes if options.modes is not None else GRID_MODES if options.grid else MODES))
    for name in options.tasks:
        width = TASKS[name].sizes.width
        if options.head_dim is not None and width % options.head_dim:
            raise CommandError(f"--head-dim: expected a divisor of the width {width} of {name}, got {options.head_dim}")
    if not modes:
        raise CommandError("--modes: expected at least one name, got nothing")
    for mode in modes:
        for one in trained_and_tested(mode):
            check_mode(one)
    if options.grid and len(modes) != 2:
        raise CommandError(f"--grid: expected two --modes, got {len(modes)}")
    return modes


def _recorded(files: dict[str, Path], options: Namespace) -> list[Run]:
    """Read the runs of the modes and the model that are asked for."""
    asked = options.qk_norm, options.head_dim
    runs = [run for file in files.values() for run in read(file) if run.mode in options.modes]
    runs = [run for run in runs if (run.qk_norm, run.head_dim) == asked]
    if not runs:
        raise CommandError(f"--report: expected runs in {', '.join(map(str, files.values()))}, got none")
    return runs


def _trained(files: dict[str, Path], options: Namespace) -> list[Run]:
    """Train, and append each run to its task's file, unless the file has it."""
    runs = _planned(options)
    known = {run.key: run for file in files.values() for run in read(file)}
    with Progress(total=sum(run.recipe.steps for run in runs), unit="step", leave=False) as progress:
        for run in runs:
            if run.key in known:
                progress.update(run.recipe.steps)
                continue
            progress.set_description(f"{run.subject}: {run.mode}, seed {run.seed}")
            known[run.key] = train(run, options.device, progress.update)
            append(files[run.task], [asdict(run)], digits=5)
    return [known[run.key] for run in runs]


def _planned(options: Namespace) -> list[Run]:
    """List the runs that are to be trained, a task's seeds outermost: a command that is stopped has whole seeds."""
    seeds = options.seeds or (_QUICK_SEEDS if options.quick else _GRID_SEEDS if options.grid else _SEEDS)
    date = datetime.now(timezone.utc).date().isoformat()
    source = Environment.of(options.device), command_line(), date
    choices = {"quick": options.quick, "qk_norm": options.qk_norm, "head_dim": options.head_dim}
    return [
        Run(task, mode, seed, recipe, *source, **choices)
        for task in dict.fromkeys(options.tasks)
        for seed in range(seeds)
        for recipe in _recipes(options, task)
        for mode in options.modes
    ]


def _recipes(options: Namespace, task: str) -> list[Recipe]:
    default = TASKS[task].recipe
    default = replace(default, steps=options.steps or (_QUICK_STEPS if options.quick else default.steps))
    if not options.grid:
        return [default]
    return [
        replace(default, optimizer=optimizer, learning_rate=rate, weight_decay=decay)
        for optimizer, (rates, decays) in _GRID.items()
        for rate in rates
        for decay in decays
    ]


def _same_data(runs: list[Run]) -> bool:
    """Compare the batches of a seed over modes and optimizers; print the first run that had others."""
    seen: dict[tuple, Run] = {}
    for run in runs:
        if run.status == "diverged":  # it stopped early
            continue
        other = seen.setdefault((run.task, run.seed, run.recipe.steps, run.recipe.batch), run)
        if other.data != run.data:
            print(f"{run.task}, seed {run.seed}: {run.mode} and {other.mode} saw different data", file=sys.stderr)
            return False
    return True
