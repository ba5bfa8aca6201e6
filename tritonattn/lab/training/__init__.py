"""What a scaling does to training: the `tritonattn train-compare` command."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from tqdm import tqdm

from ...core.command import CommandError, made_folder, usable_device
from ...core.provenance import Environment, command_line
from .modes import MODES, check_mode
from .plot import draw
from .records import Recipe, Run, RunsFile, read
from .report import best_recipes, comparison, exponents, grid, other_metrics
from .tasks import TASKS
from .trainer import Assignment, train

_QUICK_STEPS, _QUICK_SEEDS, _SEEDS, _GRID_SEEDS = 6, 2, 5, 2
_WEIGHT_DECAY = 0.01
_GRID = {
    "adamw": ((1e-3, 3e-3, 1e-2), (0.0, 0.1)),
    "sgd": ((0.03, 0.1, 0.3), (0.0, 1e-3)),
}
GRID_MODES = ("sqrt_dim", "key_norm_sum+gain")


@dataclass(frozen=True)
class Request:
    """What the user asked for; None takes the default.

    grid     two modes with every optimiser, learning rate and weight decay instead of all modes with the task's own
    report   train nothing: the tables and plots of the runs in the folder, from wherever they are
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    modes: tuple[str, ...] | None = None
    seeds: int | None = None
    steps: int | None = None
    quick: bool = False
    grid: bool = False
    report: bool = False
    out: Path = Path("train-compare")
    device: str = "cpu"


def run(request: Request) -> int:
    """Train what is not yet in the folder, print and write the tables and the plots. Returns 0, or 1 where the data of
    two modes differed."""
    modes, device = _checked(request)
    if request.report:
        runs = _recorded(request, modes)
    else:
        runs = _trained(_assignments(request, modes, device), request, Environment.of(device))
    text = _tables(runs, request)
    print(text)
    (request.out / f"{_stem(request)}.md").write_text(text + "\n", encoding="utf-8")
    if not request.grid:
        for name in dict.fromkeys(run.task for run in runs):
            file = request.out / f"{name}.png"
            draw([run for run in runs if run.task == name], file)
            print(f"plot: {file}", file=sys.stderr)
    return 0 if _same_data(runs) else 1


def _checked(request: Request) -> tuple[tuple[str, ...], torch.device]:
    unknown = [name for name in request.tasks if name not in TASKS]
    if unknown or not request.tasks:
        got = ", ".join(map(repr, unknown)) if unknown else "nothing"
        raise CommandError(f"--tasks: wanted names out of {', '.join(TASKS)}; got {got}")
    modes = tuple(dict.fromkeys(request.modes if request.modes is not None else GRID_MODES if request.grid else MODES))
    if not modes:
        raise CommandError("--modes: wanted at least one name, got nothing")
    for mode in modes:
        check_mode(mode)
    if request.grid and len(modes) != 2:
        raise CommandError(f"--grid: wanted two --modes, got {len(modes)}")
    for option, value, least in (("--seeds", request.seeds, 2), ("--steps", request.steps, 1)):
        if value is not None and value < least:
            raise CommandError(f"{option}: wanted at least {least}, got {value}")
    device = usable_device(request.device)
    if not request.report:
        made_folder("--out", request.out)
    return modes, device


def _assignments(request: Request, modes: tuple[str, ...], device: torch.device) -> list[Assignment]:
    """Seeds outermost: a comparison that is stopped has whole seeds of every mode."""
    seeds = request.seeds or (_QUICK_SEEDS if request.quick else _GRID_SEEDS if request.grid else _SEEDS)
    return [
        Assignment(task, mode, seed, recipe, device, request.quick)
        for task in (TASKS[name]() for name in dict.fromkeys(request.tasks))
        for seed in range(seeds)
        for recipe in _recipes(request, task.defaults)
        for mode in modes
    ]


def _recipes(request: Request, defaults) -> list[Recipe]:
    steps = request.steps or (_QUICK_STEPS if request.quick else defaults.steps)
    if not request.grid:
        return [Recipe("adamw", defaults.learning_rate, _WEIGHT_DECAY, steps, defaults.batch)]
    return [
        Recipe(optimizer, rate, decay, steps, defaults.batch)
        for optimizer, (rates, decays) in _GRID.items()
        for rate in rates
        for decay in decays
    ]


def _recorded(request: Request, modes: tuple[str, ...]) -> list[Run]:
    """The runs of the tasks and modes asked for that the folder has."""
    files = [request.out / f"{_stem(request)}-{name}.jsonl" for name in request.tasks]
    runs = [run for file in files if file.exists() for run in read(file) if run.mode in modes]
    if not runs:
        raise CommandError(f"--report: wanted runs in {', '.join(str(file) for file in files)}, found none")
    return runs


def _trained(assignments: list[Assignment], request: Request, environment: Environment) -> list[Run]:
    runs, command = [], command_line()
    files = {name: RunsFile(request.out / f"{_stem(request)}-{name}.jsonl") for name in request.tasks}
    with tqdm(total=sum(one.recipe.steps for one in assignments), unit="step", leave=False) as progress:
        for one in assignments:
            key = (one.task.name, one.mode, one.seed, one.recipe, one.quick, environment)
            known = files[one.task.name].get(key)
            if known is None:
                progress.set_description(f"{one.task.name} {one.mode}, seed {one.seed}")
                known = _run(one, environment, command, progress)
                files[one.task.name].append(known)
            else:
                progress.update(one.recipe.steps)
            runs.append(known)
    return runs


def _run(one: Assignment, environment: Environment, command: str, progress: tqdm) -> Run:
    trace = train(one, progress.update)
    date = datetime.now(timezone.utc).date().isoformat()
    return Run(
        task=one.task.name,
        mode=one.mode,
        seed=one.seed,
        recipe=one.recipe,
        environment=environment,
        command=command,
        date=date,
        quick=one.quick,
        **asdict(trace),
    )


def _tables(runs: list[Run], request: Request) -> str:
    parts = []
    if request.quick:
        parts.append("A smoke run (--quick): too few steps for any figure here to mean anything.")
    for name in dict.fromkeys(run.task for run in runs):
        same = [run for run in runs if run.task == name]
        about = f"{len({run.seed for run in same})} seeds; {same[0].environment}; `{same[0].command}`"
        if request.grid:
            parts += [f"## {name}, grid\n\n{about}.", grid(same), best_recipes(same)]
            continue
        parts += [f"## {name}\n\n{same[0].recipe}; {about}.", comparison(same), other_metrics(same)]
    parts.append(exponents([] if request.grid else runs))
    return "\n\n".join(part for part in parts if part)


def _same_data(runs: list[Run]) -> bool:
    """Whether runs that differ in their mode, or in their optimiser, saw the same batches; says which did not."""
    seen: dict[tuple, Run] = {}
    for run in runs:
        if run.status == "diverged":  # it stopped before the others
            continue
        other = seen.setdefault((run.task, run.seed, run.recipe.steps, run.recipe.batch), run)
        if other.data != run.data:
            print(f"{run.task}, seed {run.seed}: {run.mode} and {other.mode} saw different data", file=sys.stderr)
            return False
    return True


def _stem(request: Request) -> str:
    return "grid" if request.grid else "runs"
