"""Train small models with each scaling, several seeds each, and compare them.

Small transformers learn small tasks: a byte language model (text), a vision transformer (digits), numbers to words by
cross attention (spell), and, tested with more keys than in training, retrieval from a table (recall) and of a string's
first bit (first). Every mode of a seed starts from the same weights and gets the same data. Writes records, tables and
plots into a folder; the same command goes on where it was stopped. Needs no GPU; pip install '.[lab]'.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path

from tritonattn.cli.options import add_device, add_number, make_folder, names
from tritonattn.core.errors import CommandError
from tritonattn.core.progress import Progress
from tritonattn.core.provenance import Environment, command_line
from tritonattn.core.records import append, write

from ...options import add_folder
from .modes import MODES, check_mode, trained_and_tested
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


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    tasks = "tasks to train on: text, digits, spell, recall, first (default: all but first)"
    add("--tasks", type=names, default="text,digits,spell,recall", metavar="A,B", help=tasks)
    modes = (
        "modes, learned scalings (ssmax, power_law, ...), modes with a learned gain per head (key_count+gain) or a "
        "constant one (sqrt_dim*4), and two of these, the second for testing only (sqrt_dim:log_key_count); "
        "default: nine of them, or with --grid sqrt_dim,key_norm_sum+gain"
    )
    add("--modes", type=names, metavar="A,B", help=modes)
    add_number(parser, "--seeds", 2, "runs of each mode, at least 2 (default: 5; 2 with --quick or --grid)")
    add_number(parser, "--steps", 1, "steps of every run (default: that of each task)")
    add("--qk-norm", action="store_true", help="models that RMS-normalise q and k, as Qwen 3 and Gemma 3 do")
    add_number(parser, "--head-dim", 1, "the dimension of every head, a divisor of a model's width (default: 16)")
    add("--grid", action="store_true", help="train two modes with several optimizers, learning rates and weight decays")
    add("--quick", action="store_true", help="train everything for a few steps, to see that it works")
    add("--report", action="store_true", help="train nothing; write tables and plots of the runs in the folder")
    add_folder(parser, "train-compare")
    add_device(parser, "where models train")
    parser.set_defaults(run=run)


def run(options: Namespace) -> None:
    """Train the runs that the folder lacks, print and write the tables, draw the plots; --report trains none.

    Raises CommandError where the data of two modes differed.
    """
    options.modes = checked_modes(options)
    if not options.report:
        make_folder("--out", options.out)
    stem = "grid" if options.grid else "runs"
    files = {name: options.out / f"{stem}-{name}.jsonl" for name in options.tasks}
    runs = _recorded(files, options) if options.report else _trained(files, options)
    text = tables(runs, grid=options.grid, quick=options.quick)
    print(text)
    write(options.out / f"{stem}.md", text + "\n")
    if not options.grid:
        from tritonattn.lab.figures import save

        from .plot import figure_of

        for name, same in grouped(runs, lambda run: run.subject).items():
            file = options.out / f"{name.replace(', ', '-').replace(' ', '-')}.png"
            save(figure_of(same), file)
            print(f"plot: {file}", file=sys.stderr)
    _check_data(runs)


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


def _check_data(runs: list[Run]) -> None:
    """Raise CommandError where modes or optimizers had other batches of a seed."""
    seen: dict[tuple, Run] = {}
    for run in runs:
        if run.status == "diverged":  # it stopped early
            continue
        other = seen.setdefault((run.task, run.seed, run.recipe.steps, run.recipe.batch), run)
        if other.data != run.data:
            raise CommandError(f"{run.task}, seed {run.seed}: {run.mode} and {other.mode} saw different data")
