"""Launch kernels on random calls for a while, and hold each result to float64 and to its repetition."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import torch

from tritonattn.backends.triton import launch
from tritonattn.cli.options import whole_number
from tritonattn.core.provenance import commit

from ..devices import kernels_on, obstacle
from . import instrument
from .draw import HAZARD_SEEDS, INTERPRETED, ON_A_GPU, trials
from .guards import CONFIGS, small_tiles, soaking
from .trial import Trial

_SECONDS_BETWEEN_LINES = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=10.0, help="how long, but one call at least")
    parser.add_argument("--trials", type=whole_number, help="stop after so many calls")
    hazard = f"of the first call; below {HAZARD_SEEDS}: head_dim 32, several stages"
    parser.add_argument("--seed", type=int, default=0, help=hazard)
    parser.add_argument(
        "--go-on", type=Path, metavar="FILE", help="begin behind the last seed in this file; keep it there"
    )
    about = "a GPU, Triton's interpreter, or emulated on a stub of NVIDIA's driver"
    known = ("cuda", "cpu", "emulate")
    parser.add_argument("--device", choices=known, default="cuda" if torch.cuda.is_available() else "cpu", help=about)
    parser.add_argument(
        "--bare", action="store_true", help="tensors as they come, without NaN around and in them: for a sanitizer"
    )
    parser.add_argument(
        "--instrument",
        choices=instrument.INSTRUMENTS,
        help="compile a sanitizer of Triton's in; small tiles, since it is slow",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Soak; print each failed call with a command that repeats it, and then exit with an error."""
    where = "interpret" if arguments.device == "cpu" else arguments.device
    if reason := obstacle(where):
        sys.exit(f"soak: {reason}")
    if arguments.instrument and (reason := instrument.obstacle(arguments.instrument)):
        sys.exit(f"soak: --instrument: {reason}")
    warnings.filterwarnings("ignore", ".*deterministic")
    name = torch.cuda.get_device_name() if where == "cuda" else where
    first = max(arguments.seed, _next_seed(arguments.go_on))
    print(f"commit {commit()}, torch {torch.__version__}, {name}, seeds from {first}", flush=True)
    start = shown = time.monotonic()
    count = failed = 0
    with (
        instrument.instrumented(arguments.instrument),
        kernels_on(where) as device,
        soaking(guards=not arguments.bare) as executor,
    ):
        for trial in trials(first, device, ON_A_GPU if where == "cuda" else INTERPRETED):
            now = time.monotonic()
            if (count and now - start > 60 * arguments.minutes) or count == arguments.trials:
                break
            if now - shown > _SECONDS_BETWEEN_LINES:
                print(f"{now - start:.0f} s: {count} calls, {executor.launches} launches, {failed} failed", flush=True)
                shown = now
            is_quick = where == "cuda" and not arguments.instrument
            launch.config_for = CONFIGS[trial.stages] if is_quick else small_tiles
            failed += not _passes(trial, arguments)
            count += 1
            if arguments.go_on:
                arguments.go_on.write_text(f"{commit()}\n{trial.seed + 1}\n", encoding="utf-8")
    summary = f"{count} calls, {executor.launches} launches"
    if failed:
        sys.exit(f"{summary}: {failed} calls failed")
    print(f"{summary}: every result within the bound, and the same twice")


def _next_seed(file: Path | None) -> int:
    """Read the seed behind the last one of this commit; 0 where there is none."""
    if file is None or not file.is_file():
        return 0
    of_commit, _, seed = file.read_text(encoding="utf-8").partition("\n")
    return int(seed) if of_commit == commit() and seed.strip().isdecimal() else 0


def _passes(trial: Trial, arguments: argparse.Namespace) -> bool:
    """True where a call is right. The soak ends where a call raises anything else, as after an illegal access."""
    described = str(trial)  # before the call: after an illegal access no tensor can be read
    try:
        trial.check()
    except Exception as error:
        bare = " --bare" * arguments.bare + f" --instrument {arguments.instrument}" * bool(arguments.instrument)
        repeat = f"python -m perf soak --device {arguments.device} --trials 1 --seed {trial.seed}{bare}"
        print(f"{described}\n{type(error).__name__}: {error}\nrepeat it: {repeat}", file=sys.stderr, flush=True)
        if not isinstance(error, AssertionError):
            sys.exit(1)
        return False
    return True
