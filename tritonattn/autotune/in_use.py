"""The configs in use, and the machine that uses them: executor, GPUs, cache folders, tables."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import triton
from tabulate import tabulate

from ..backends.triton import launch
from ..core.errors import CommandError
from ..tuning import cache_dir, lookup
from ..tuning.config import OPTIONS, SHARES, Target, TileConfig
from ..tuning.fingerprint import kernels_fingerprint
from ..tuning.gpus import GPU, GPUS
from ..tuning.ptxas import ptxas_of, suspicion
from ..tuning.table import Entry, EntryKey, TableError, keys
from .timing import card_state


def kernel_facts() -> dict[str, str]:
    """Describe how kernels run on this machine, by the names that `tritonattn env` prints."""
    facts = {
        "kernels": kernels_fingerprint(),
        "kernels run": _how_kernels_run(),
        "shipped tables": _folder(cache_dir.shipped_tables),
        "user cache": _folder(cache_dir.user_cache),
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", "not set"),
    }
    if not torch.cuda.is_available():
        return facts | {"GPU": "none"}
    for index in range(torch.cuda.device_count()):
        facts |= _of_gpu(torch.device("cuda", index))
    return facts


def _how_kernels_run() -> str:
    if launch.interpreting:
        return "in Triton's interpreter (TRITON_INTERPRET=1)"
    return "compiled" if torch.cuda.is_available() else "never: there is no GPU, and TRITON_INTERPRET=1 is not set"


def _folder(folder: Callable[[], Path]) -> str:
    try:
        return str(folder())
    except (FileNotFoundError, RuntimeError) as error:
        return str(error)


def _of_gpu(device: torch.device) -> dict[str, str]:
    target = Target.of(device)
    facts = {f"GPU {device.index}": f"{target.card}, {target.name}"}
    if used := ptxas_of(device):
        facts[f"GPU {device.index} ptxas"] = suspicion(used) or used
    facts |= {f"GPU {device.index} {name}": value for name, value in card_state(device).items()}
    return facts | {f"GPU {device.index} {name}": text for name, text in tables(target).items()}


def tables(target: Target) -> dict[str, str]:
    """Describe each file that may hold a target's table: how many keys take their config from it, or why none does."""
    used = [lookup.find(key.kernel, key.problem, target).path for key in keys()]
    found = {}
    for path in lookup.paths(target):
        try:
            entries = lookup.usable_table(path, target).entries
            found[str(path)] = f"{len(entries)} entries, {used.count(path)} of {len(used)} in use{_of_others(entries)}"
        except FileNotFoundError:
            found[str(path)] = "no such file"
        except TableError as error:
            found[str(path)] = f"skipped: {error}"
    return found | {"defaults": f"{used.count(None)} of {len(used)} in use"}


def _of_others(entries: Mapping[EntryKey, Entry]) -> str:
    """Name the other versions of Triton that compiled entries: a call checks such code again."""
    others = Counter(entry.triton for entry in entries.values() if entry.triton != triton.__version__)
    return "".join(
        f"; {count} for triton {version}, checked when compiled" for version, count in sorted(others.items())
    )


def configs(gpu: str | None) -> int:
    """Print the config and source of every key on a GPU, and of single problems with entries; None: of this machine."""
    if gpu is None and not torch.cuda.is_available():
        raise CommandError(f"expected --gpu NAME, one of {', '.join(one.name for one in GPUS)}: there is no GPU here")
    if gpu is None:
        target = Target.of(torch.device("cuda"))
    else:  # the name of an architecture stands for a card for which no table is shipped
        target = named_gpus("--gpu", (gpu,), everything=())[0].target._replace(card=gpu)
    rows = []
    for key in (*keys(), *lookup.problems(target)):
        found = lookup.find(key.kernel, key.problem, target)
        rows.append([key, shown(found.config), _origin(found)])
    print(tabulate(rows, ["key", "config", "from"], "github", disable_numparse=True))
    return 0


def named_gpus(option: str, names: tuple[str, ...], everything: tuple[str, ...] = ("all",)) -> list[GPU]:
    """Find GPUs by their names, their architectures, or a word for all of them. Raises CommandError."""
    found: list[GPU] = []
    for name in names:
        meant = [gpu for gpu in GPUS if name in (gpu.name, gpu.target.name) or name in everything]
        if not meant:
            known = ", ".join((*(gpu.name for gpu in GPUS), "sm_90", "...", *everything))
            raise CommandError(f"{option}: expected {known}, got {name!r}")
        found += [gpu for gpu in meant if gpu not in found]
    return found


def shown(config: TileConfig) -> str:
    """Write a config on one line."""
    loads = " descriptors" if config.descriptors else ""
    others = "".join(f", {name} {value}" for name, value in config.as_record().items() if name in SHARES | OPTIONS)
    return f"{config.block_m} x {config.block_n}, {config.num_warps} warps, {config.num_stages} stages{loads}{others}"


def _origin(found: lookup.ChosenConfig) -> str:
    if found.path is None or found.entry is None:
        return "default"
    whose = "shipped" if str(found.path.parent) == _folder(cache_dir.shipped_tables) else "yours"
    source = f"{whose}: {found.path.name}, {found.entry.source}"
    return source + (f", for triton {found.entry.triton}" if found.is_of_another_triton else "")
