"""The number of cores that a command may use, and torch's threads."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

_STAT, _QUOTA = Path("/proc/stat"), Path("/sys/fs/cgroup/cpu.max")
_SECONDS = 0.2  # of watching the cores


def limit_threads() -> None:
    """Give torch no more threads than cores are idle; OMP_NUM_THREADS, if set, decides instead.

    A thread that waits for a core delays all others at the end of every operation: small operations then take ten
    times as long as with one thread.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), usable_cores(), idle_cores())))


def usable_cores() -> int:
    """Count the cores that this process may run on; a container often has fewer than the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # Linux or not
    try:
        quota, period = _QUOTA.read_text(encoding="utf-8").split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no control group, or "max": no quota
        return cores


def idle_cores() -> int:
    """Count the cores of this process that others leave idle now; all of them where the system does not tell."""
    before = _idle_seconds()
    time.sleep(_SECONDS)
    after = _idle_seconds()
    return sum(after[core] - before[core] > _SECONDS / 2 for core in before) if before else usable_cores()


def _idle_seconds() -> dict[str, float]:
    """The seconds that each core of this process has been idle, from /proc/stat."""
    if not _STAT.exists():
        return {}
    mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    lines = [line.split() for line in _STAT.read_text(encoding="utf-8").splitlines()]
    ticks = os.sysconf("SC_CLK_TCK")
    return {name: (int(times[3]) + int(times[4])) / ticks for name, *times in lines if name in mine}
