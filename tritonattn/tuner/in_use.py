"""What kernels run with on this machine: the executor, GPUs, cache folders, and the tables that configs come from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from ..backends.triton import launch
from ..tuning import cache_dir, lookup
from ..tuning.config import Target
from ..tuning.table import TableError, kernels_fingerprint
from .static import keys
from .timing import card_state


def kernel_facts() -> dict[str, str]:
    facts = {
        "kernels": kernels_fingerprint(),
        "kernels run": "in Triton's interpreter (TRITON_INTERPRET=1)" if launch.interpreting else "compiled",
        "shipped tables": _told(cache_dir.shipped_tables),
        "user cache": _told(cache_dir.user_cache),
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", "not set"),
    }
    if not torch.cuda.is_available():
        return facts | {"GPU": "none"}
    for index in range(torch.cuda.device_count()):
        facts |= _of_gpu(torch.device("cuda", index))
    return facts


def _told(folder: Callable[[], Path]) -> str:
    try:
        return str(folder())
    except (FileNotFoundError, RuntimeError) as error:
        return str(error)


def _of_gpu(device: torch.device) -> dict[str, str]:
    target = Target.of(device)
    facts = {f"GPU {device.index}": f"{target.card}, {target.name}"}
    facts |= {f"GPU {device.index} {name}": value for name, value in card_state(device).items()}
    return facts | {f"GPU {device.index} {name}": text for name, text in tables(target).items()}


def tables(target: Target) -> dict[str, str]:
    """Each file that may hold a table for a target: how many keys take their config from it, or why none does."""
    used = [lookup.find(key.kernel, key.problem, target).path for key in keys()]
    found = {}
    for path in lookup.paths(target):
        try:
            table = lookup.usable_table(path, target)
            found[str(path)] = f"{len(table.entries)} entries, {used.count(path)} of {len(used)} in use"
        except FileNotFoundError:
            found[str(path)] = "no such file"
        except TableError as error:
            found[str(path)] = f"skipped: {error}"
    return found | {"defaults": f"{used.count(None)} of {len(used)} in use"}
