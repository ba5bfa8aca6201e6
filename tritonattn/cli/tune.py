"""The commands: which keys, which table, what is printed."""

from __future__ import annotations

import errno
import math
import os
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tabulate import tabulate

from ..backends.triton import launch
from ..core.command import INTERRUPTED, CommandError
from ..tuner.progress import tqdm
from ..tuner.search import Effort, Result, SearchError, pending, promising, search
from ..tuner.static import Compiler, keys, static_table
from ..tuning import cache_dir, lookup
from ..tuning.config import Target, TileConfig
from ..tuning.defaults import default_config
from ..tuning.gpus import GPU, GPUS, table_name
from ..tuning.table import Entry, Key, Table, TableError, kernels_fingerprint, read_table, write_table

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Request:
    """What `tritonattn tune` is asked for.

    dtypes    that a search times and checks each config in; an entry serves both
    static    names of GPUS, architectures, or "all": no timing, no GPU
    workers   processes that compile
    write     into autotune_cache/ rather than the user's folder
    budget    minutes after which no further search, or architecture, begins
    """

    kernels: tuple[str, ...]
    head_dims: tuple[int, ...]
    lengths: tuple[str, ...]
    workers: int
    dtypes: tuple[str, ...] = ("bf16",)
    static: tuple[str, ...] = ()
    write: bool = False
    budget: float | None = None

    @property
    def keys(self) -> list[Key]:
        return [key for key in keys(self.kernels, self.head_dims) if key.lengths in self.lengths]


def tune(request: Request) -> int:
    """Search on this machine's GPU, or write static tables."""
    if launch.interpreting:
        raise CommandError("expected compiled kernels, got TRITON_INTERPRET=1, which leaves none: unset it")
    if request.workers < 1:
        raise CommandError(f"--workers: expected at least 1, got {request.workers}")
    if request.budget is not None and math.isnan(request.budget):
        raise CommandError("--budget: expected minutes, got nan")
    try:
        return _tune_static(request) if request.static else _tune_here(request)
    except BrokenProcessPool as error:
        raise CommandError(
            "a process that compiles was ended from outside, perhaps for lack of memory: --workers takes fewer at once"
        ) from error


def _end(request: Request) -> float:
    """Of the budget that begins now, on the clock of time.monotonic."""
    return math.inf if request.budget is None else time.monotonic() + 60 * request.budget


def named_gpus(option: str, names: tuple[str, ...], everything: tuple[str, ...] = ("all",)) -> list[GPU]:
    """The GPUs of GPUS by their names or architectures, or a word for everything. Raises CommandError."""
    found: list[GPU] = []
    for name in names:
        meant = [gpu for gpu in GPUS if name in (gpu.name, gpu.target.name) or name in everything]
        if not meant:
            known = ", ".join((*(gpu.name for gpu in GPUS), "sm_90", "...", *everything))
            raise CommandError(f"{option}: expected {known}; got {name!r}")
        found += [gpu for gpu in meant if gpu not in found]
    return found


def _tune_static(request: Request) -> int:
    gpus = named_gpus("--static", request.static)
    for gpu in gpus:
        _check_folder(_path(gpu.name, request.write), request.write)
    end = _end(request)
    for target in dict.fromkeys(gpu.target for gpu in gpus):
        if time.monotonic() >= end:
            print(f"the budget of {request.budget:g} minutes is spent: nothing is compiled from {target.name} on")
            break
        with Compiler(target, request.workers) as compiler, tqdm(unit="kernel", desc=target.name) as progress:
            tables = [
                static_table(gpu, compiler, request.keys, progress.update) for gpu in gpus if gpu.target == target
            ]
            if request.keys and not any(table.entries for table in tables):
                _check_that_it_compiles(compiler, request.keys[0])
        for table in tables:
            path = _path(table.gpu, request.write)
            before = _entries(path, table.target)
            kept = {
                key: entry for key, entry in before.items() if entry.source == "measured" or key not in table.entries
            }
            joined = replace(table, entries=table.entries | kept)
            _write(path, joined, request.write)
            print(f"\n{path}: {len(joined.entries)} entries\n\n{_static_summary(joined, before, request.keys)}")
    return 0


def _path(gpu: str, write: bool) -> Path:
    try:
        folder = cache_dir.shipped_tables() if write else cache_dir.user_cache() / "autotune"
    except (FileNotFoundError, RuntimeError) as error:
        raise CommandError(f"{error}; $TRITONATTN_CACHE_DIR names a folder for the user's tables") from error
    return folder / f"{gpu}.json"


def _entries(path: Path, target: Target) -> dict[Key, Entry]:
    """Of a file that is still of use; what is not is said and left behind."""
    try:
        return lookup.usable_table(path, target).entries
    except FileNotFoundError:
        return {}
    except TableError as error:
        print(f"not kept: {error}")
        return {}


def _check_folder(path: Path, shipped: bool) -> None:
    """Refuse, before the work, a folder that could not be written after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _unwritable(path, error, shipped) from error


def _write(path: Path, table: Table, shipped: bool) -> None:
    try:
        write_table(path, table)
    except OSError as error:
        raise _unwritable(path, error, shipped) from error


def _unwritable(path: Path, error: OSError, shipped: bool) -> CommandError:
    other = "without --write the user's folder is written" if shipped else "$TRITONATTN_CACHE_DIR names another folder"
    return CommandError(f"cannot write {path}: {error.strerror or error}; {other}")


def _check_that_it_compiles(compiler: Compiler, key: Key) -> None:
    """Where nothing passed, say whether nothing compiles: then it is the machine that is at fault, not the configs."""
    config = default_config(key.kernel, key.problem, compiler.target)
    [found] = compiler.examine([(key.kernel, key.problem, config)])
    if found.code is None:
        raise CommandError(f"{compiler.target.name}: no config passes; {key}, {config}: {'; '.join(found.reasons)}")


def _static_summary(table: Table, before: dict[Key, Entry], wanted: list[Key]) -> str:
    rows = []
    for key in wanted:
        entry, old = table.entries.get(key), before.get(key)
        if entry is None:
            rows.append([key, "no config passes: the default serves", "", ""])
            continue
        known = entry.details.get("registers", "")
        changed = "" if old is None or old.config == entry.config else f"was {shown(old.config)}"
        rows.append([key, shown(entry.config), known, changed or entry.source])
    return tabulate(rows, ["key", "config", "registers", "source"], tablefmt="github")


def shown(config: TileConfig) -> str:
    """A config on one line."""
    kind = " descriptors" if config.descriptors else ""
    return f"{config.block_m} x {config.block_n}, {config.num_warps} warps, {config.num_stages} stages{kind}"


def _tune_here(request: Request) -> int:
    if not torch.cuda.is_available():
        raise CommandError(
            "expected a GPU, found none. Without one, `--static NAME` compiles for "
            f"{', '.join(gpu.name for gpu in GPUS)}, an architecture as sm_90, or all, and ranks by a model"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    target = Target.of(device)
    path = _path(table_name(target), request.write)
    _check_folder(path, request.write)
    todo = pending(request.keys, _entries(path, target))
    if len(todo) < len(request.keys):
        print(f"{len(request.keys) - len(todo)} of {len(request.keys)} keys are measured already in {path}")
    results, stopped = _search_all(request, todo, target, device, path)
    print(f"\n{path}\n\n{_measured_summary(results)}")
    wrong = [line for result in results for line in result.wrong]
    if wrong:
        print("\nNot taken, since results or the run were wrong:\n" + "\n".join(wrong))
    return INTERRUPTED if stopped else 0


def _search_all(
    request: Request, todo: list[Key], target: Target, device: torch.device, path: Path
) -> tuple[list[Result], bool]:
    """The results, and whether Ctrl-C ended the search.

    Each result goes at once into the file, beside what others wrote there: Ctrl-C loses one search at most.
    """
    results: list[Result] = []
    stopped = False
    found: dict[Key, Entry] = {}
    end = _end(request)
    with Compiler(target, request.workers) as compiler, tqdm(todo, unit="key") as progress:
        for key in progress:
            if time.monotonic() >= end:
                print(f"the budget of {request.budget:g} minutes is spent: run the command again to go on")
                break
            progress.set_postfix_str(str(key))
            try:
                effort = Effort()
                result = search(
                    key,
                    promising(key, compiler, effort.timed),
                    target,
                    device,
                    effort,
                    dtypes=tuple(DTYPES[name] for name in request.dtypes),
                )
            except KeyboardInterrupt:
                print("stopped: run the command again to go on")
                stopped = True
                break
            except SearchError as error:
                raise CommandError(f"{error}. {len(results)} keys were searched before, see {path}") from error
            results.append(result)
            if result.entry is not None:
                found[key] = result.entry
                entries = _entries(path, target) | found
                _write(path, Table(table_name(target), target, kernels_fingerprint(), entries), request.write)
                lookup.forget()
    return results, stopped


def _measured_summary(results: list[Result]) -> str:
    rows = [
        [
            result.key,
            shown(result.before),
            "" if result.entry is None else shown(result.entry.config),
            "" if result.timing is None else f"{result.timing.median:.4f}",
            "" if result.gain is None else f"{result.gain:.3f}x",
        ]
        for result in results
    ]
    return tabulate(rows, ["key", "before", "now", "ms", "gain"], tablefmt="github")


def configs(gpu: str | None) -> int:
    """Print the table of a GPU, and where each entry comes from."""
    if gpu is None and not torch.cuda.is_available():
        raise CommandError(f"expected --gpu NAME, one of {', '.join(one.name for one in GPUS)}: there is no GPU here")
    target = Target.of(torch.device("cuda")) if gpu is None else _named_target(gpu)
    rows = []
    for key in keys():
        found = lookup.find(key.kernel, key.problem, target)
        rows.append([key, shown(found.config), _origin(found.path, key)])
    print(tabulate(rows, ["key", "config", "from"], tablefmt="github"))
    return 0


def _named_target(name: str) -> Target:
    """That of a GPU, or of a card without a table of its own where it is an architecture that is named."""
    return named_gpus("--gpu", (name,), everything=())[0].target._replace(card=name)


def _origin(path: Path | None, key: Key) -> str:
    if path is None:
        return "default"
    return f"{path.name}, {read_table(path).entries[key].source}"
