"""Count random cases in which `batch_invariant` gives a sequence the same bits alone and with the rest of a batch."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from contextlib import contextmanager
from unittest.mock import patch

import torch

from tritonattn.backends.triton import launch
from tritonattn.calls import key_statistics
from tritonattn.cli.options import whole_number
from tritonattn.core.errors import CommandError
from tritonattn.tuning.config import TileConfig

from .invariance_cases import cases, differences

# Lengths and head dims: a CPU's tiles hold 32 rows and 256 keys, a GPU's 128 of each, those of the emulator are small.
_WHOLE = ((16, 700), ((64, 64), (20, 33), (128, 128)))
_SIZES = {"cuda": _WHOLE, "sdpa": _WHOLE}
_EMULATED = ((16, 70), ((16, 16), (32, 32), (40, 24), (20, 17)))
_TILES = {"sm_80": TileConfig(16, 16, 1, 2), "sm_90": TileConfig(64, 16, 4, 2)}


@contextmanager
def device(backend: str):
    """The CPU; a GPU, for all tensors made inside; or the emulator, whose descriptors are on for sm_90."""
    if backend == "sdpa":
        yield
        return
    if backend == "cuda":
        with torch.device("cuda"):
            yield
        return
    from tests.emulated.executor import GPU, Executor
    from tests.stub import installed

    gpu = GPU(int(backend[3:]), backend == "sm_90")
    with (
        patch.object(launch, "config_for", gpu.config(_TILES[backend])),
        patch.object(key_statistics, "launches", lambda *keys: True),  # not only of tensors on a GPU
        installed().active(gpu.capability, Executor()),
    ):
        yield


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=("cuda", "sdpa", *_TILES), default="sdpa")
    parser.add_argument("--cases", type=whole_number, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="how long, but one case at least")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    if options.backend == "cuda" and not torch.cuda.is_available():
        raise CommandError("device cuda: torch finds no GPU")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty
    counts: Counter[str] = Counter()
    lengths, dims = _SIZES.get(options.backend, _EMULATED)
    end = time.monotonic() + 60 * options.minutes
    for case in cases(options.cases, options.seed, lengths, dims):
        if counts and time.monotonic() > end:
            print(f"time is up: {dict(counts)} of {options.cases} cases")
            break
        found = "equal"
        try:
            with device(options.backend):
                if differing := differences(case, "sdpa" if options.backend == "sdpa" else "triton"):
                    found = "differ"
                    print(f"DIFFER {', '.join(differing)}: {case}", flush=True)
        except NotImplementedError as refusal:
            found = "refused"
            print(f"refused {case}: {refusal}", flush=True)
        counts[found] += 1
        if counts.total() % 10 == 0 or counts.total() == options.cases:
            print(f"{options.backend}: {dict(counts)} of {options.cases} cases", flush=True)
    sys.exit(int(counts["differ"] > 0))
