"""Launch kernels on random calls for a while, and hold each result to float64 and to its own repetition."""

from __future__ import annotations

import argparse
import sys
import time
import warnings

import torch

from tritonattn.backends.triton import launch
from tritonattn.cli.options import whole_number
from tritonattn.core.provenance import commit

from .soak_draw import HAZARD_SEEDS, INTERPRETED, ON_A_GPU, trials
from .soak_guards import CONFIGS, small_tiles, soaking
from .soak_trial import Trial

_SECONDS_BETWEEN_LINES = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=10.0, help="how long, but one call at least")
    parser.add_argument("--trials", type=whole_number, help="stop after so many calls")
    hazard = f"of the first call; below {HAZARD_SEEDS}: head_dim 32, several stages"
    parser.add_argument("--seed", type=int, default=0, help=hazard)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--bare", action="store_true", help="tensors as they come, without NaN around and in them: for a sanitizer"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Soak; print each failed call with a command that repeats it, and then exit with an error."""
    device = torch.device(arguments.device)
    if obstacle := _obstacle(device):
        sys.exit(f"soak: {obstacle}")
    warnings.filterwarnings("ignore", ".*deterministic")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"
    print(f"commit {commit()}, torch {torch.__version__}, {name}, seeds from {arguments.seed}", flush=True)
    start = shown = time.monotonic()
    count = failed = 0
    with soaking(guards=not arguments.bare) as executor:
        for trial in trials(arguments.seed, device, ON_A_GPU if device.type == "cuda" else INTERPRETED):
            now = time.monotonic()
            if (count and now - start > 60 * arguments.minutes) or count == arguments.trials:
                break
            if now - shown > _SECONDS_BETWEEN_LINES:
                print(f"{now - start:.0f} s: {count} calls, {executor.launches} launches, {failed} failed", flush=True)
                shown = now
            launch.config_for = small_tiles if launch.interpreting else CONFIGS[trial.stages]
            failed += not _passes(trial, arguments)
            count += 1
    summary = f"{count} calls, {executor.launches} launches"
    if failed:
        sys.exit(f"{summary}: {failed} calls failed")
    print(f"{summary}: every result within the bound, and the same twice")


def _obstacle(device: torch.device) -> str | None:
    """Say why no kernel can be launched on a device, or return None."""
    if device.type == "cuda":
        return None if torch.cuda.is_available() else "device cuda: torch sees no GPU"
    if launch.interpreting:
        return None
    return "device cpu: kernels run there only in Triton's interpreter: set TRITON_INTERPRET=1 in the environment"


def _passes(trial: Trial, arguments: argparse.Namespace) -> bool:
    """Whether a call is right. The soak ends where a call raises anything else, as after an illegal access."""
    described = str(trial)  # before the call: after an illegal access no tensor can be read
    try:
        trial.check()
    except Exception as error:
        bare = " --bare" if arguments.bare else ""
        repeat = f"python -m perf soak --device {arguments.device} --trials 1 --seed {trial.seed}{bare}"
        print(f"{described}\n{type(error).__name__}: {error}\nrepeat it: {repeat}", file=sys.stderr, flush=True)
        if not isinstance(error, AssertionError):
            sys.exit(1)
        return False
    return True
