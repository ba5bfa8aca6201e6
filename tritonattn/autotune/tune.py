"""Fill tables with tile configs, timed on this machine's GPU or checked without one: `tritonattn tune`."""

from __future__ import annotations

import errno
import math
import os
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import torch
from tabulate import tabulate

from ..backends.triton import launch
from ..core.errors import INTERRUPTED, CommandError
from ..core.progress import Progress as Bar
from ..tuning import cache_dir, lookup
from ..tuning.calls import Size, read_calls
from ..tuning.config import Problem, Target, TileConfig
from ..tuning.defaults import default_config
from ..tuning.fingerprint import kernels_fingerprint
from ..tuning.gpus import GPU, GPUS, table_name
from ..tuning.table import LENGTHS, SCALES, Entry, EntryKey, Key, Table, TableError, keys, write_table
from .candidates import candidates
from .gate import Candidate, Compiler, Examine, Progress, compiler_versions, examine
from .in_use import named_gpus, shown
from .search import QUICK, Effort, Result, SearchError, passing, pending, search
from .workload import typical_size

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Rank = Callable[[GPU, Compiler, Key], list[TileConfig]]
MakeTable = Callable[[GPU, Compiler, list[Key], Progress], Table]


def tune(options: Namespace) -> int:
    """Search on this machine's GPU, or write static tables; `options` are those of `tritonattn tune`."""
    if launch.interpreting:
        raise CommandError("expected compiled kernels, got TRITON_INTERPRET=1, which leaves none: unset it")
    if options.budget is not None and math.isnan(options.budget):
        raise CommandError("--budget: expected minutes, got nan")
    end = math.inf if options.budget is None else time.monotonic() + 60 * options.budget
    try:
        if options.static:
            return tune_static(options, _keys(options), end)
        typical: dict[EntryKey, Size] = {key: typical_size(key) for key in _keys(options)}
        return _tune_here(options, _recorded(options) if options.calls else typical, end)
    except BrokenProcessPool as error:
        raise CommandError(
            "a process that compiles was ended from outside, perhaps for lack of memory: --workers takes fewer at once"
        ) from error


def _keys(options: Namespace) -> list[Key]:
    return [key for key in keys(options.kernels, options.head_dims) if key.lengths in options.lengths]


def _recorded(options: Namespace) -> dict[EntryKey, Size]:
    """The recorded problems to search for, each with the size of its calls that do most of the work."""
    try:
        calls = read_calls(options.calls)
    except (TableError, FileNotFoundError) as error:
        raise CommandError(f"--calls: {error}") from error
    wanted: dict[EntryKey, Size] = {
        of: size
        for of, size in calls.largest().items()
        if of.kernel in options.kernels and LENGTHS[not of.problem.short] in options.lengths
    }
    if not wanted:
        asked = f"{', '.join(options.kernels)} of {' and '.join(options.lengths)} calls"
        raise CommandError(f"--calls: {options.calls}: expected launches of {asked}, got none")
    return wanted


def in_use_first(gpu: GPU, compiler: Compiler, key: Key) -> list[TileConfig]:
    """List the config that a call takes on a card now, then the default, then the other candidates."""
    card = gpu.target._replace(card=" ".join(gpu.words))
    in_use = lookup.config_for(key.kernel, key.problem, card)
    return list(dict.fromkeys([in_use, *candidates(key.kernel, key.problem, gpu.target)]))


def static_table(
    gpu: GPU, compiler: Compiler, wanted: list[Key], progress: Progress | None = None, ranked: Rank = in_use_first
) -> Table:
    """Make the table of a GPU, with entries for the wanted keys for which some config passes.

    It passes for the key's call, and fits with every option that such a call may have.

    ranked   lists the configs of a key on a card, the most promising first
    """
    ranks = {key: ranked(gpu, compiler, key) for key in wanted}
    first = [(key, config) for key, configs in ranks.items() for config in configs[:1]]
    compiler.examine([one for key, config in first for one in _calls(key, config)], progress)
    entries = {}
    for key, configs in ranks.items():
        for config in configs:
            found, fullest = compiler.examine(_calls(key, config), progress)
            if not found.reasons and fits(fullest, gpu.target):
                entries[key] = Entry(config, "static", compiler_versions(gpu.target) | found.details())
                break
    return Table(gpu.name, gpu.target, kernels_fingerprint(), entries)


def _calls(key: Key, config: TileConfig) -> list[tuple[str, Problem, TileConfig]]:
    return [(key.kernel, problem, config) for problem in (key.problem, _fullest(key))]


def _fullest(key: Key) -> Problem:
    """Return the call of a key that takes most shared memory: with every vector and statistic that it may have."""
    scaled = key._replace(scales=SCALES[key.kernel][-1]).problem
    return replace(scaled, left=True, key_bias=True, softcap=True, aux=key.kernel == "forward", sinks=True)


def fits(found: Candidate, target: Target) -> bool:
    return found.code is not None and found.code.shared_bytes <= target.architecture.shared_bytes


def tune_static(
    options: Namespace,
    wanted: list[Key],
    end: float,
    make_table: MakeTable = static_table,
    examine: Examine = examine,
) -> int:
    """Write tables of configs whose code, as `examine` finds it, passes; begin no architecture after `end`."""
    gpus = named_gpus("--static", options.static)
    for gpu in gpus:
        _check_folder(_path(gpu.name, options.write))
    for target in dict.fromkeys(gpu.target for gpu in gpus):
        if time.monotonic() >= end:
            print(f"the budget of {options.budget:g} minutes is spent: nothing is compiled from {target.name} on")
            break
        with Compiler(target, options.workers, examine) as compiler, Bar(unit="kernel", desc=target.name) as bar:
            tables = [make_table(gpu, compiler, wanted, bar.update) for gpu in gpus if gpu.target == target]
            if wanted and not any(table.entries for table in tables):
                _check_that_it_compiles(compiler, wanted[0])
        for table in tables:
            path = _path(table.gpu, options.write)
            before, joined = _joined(path, table)
            print(f"\n{path}: {len(joined.entries)} entries\n\n{_static_summary(joined, before, wanted)}")
    return 0


def _joined(path: Path, table: Table) -> tuple[dict[EntryKey, Entry], Table]:
    """Add a table to its file, whose measured entries stay: the file's entries before, and its table now."""
    before: dict[EntryKey, Entry] = {}

    def join() -> Table:
        before.update(_entries(path, table.target))
        measured = {key: entry for key, entry in before.items() if entry.source == "measured"}
        return replace(table, entries=before | table.entries | measured)

    return before, write_table(path, join)


def _path(gpu: str, write: bool) -> Path:
    """Return the file of a GPU's table: the shipped one for --write, else the user's."""
    try:
        folder = cache_dir.shipped_tables() if write else cache_dir.user_cache() / "autotune"
    except (FileNotFoundError, RuntimeError) as error:
        raise CommandError(f"{error}; $TRITONATTN_CACHE_DIR names a folder for the user's tables") from error
    return folder / f"{gpu}.json"


def _entries(path: Path, target: Target) -> dict[EntryKey, Entry]:
    """Read the entries of a file; one that is not usable is named on stdout, and has none."""
    try:
        return lookup.usable_table(path, target).entries
    except FileNotFoundError:
        return {}
    except TableError as error:
        print(f"not kept: {error}")
        return {}


def _check_folder(path: Path) -> None:
    """Make the folder of a table before the work. Raises OSError where it could not be written after it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path.parent))


def _check_that_it_compiles(compiler: Compiler, key: Key) -> None:
    """Raise CommandError where the default config does not compile: then the machine is at fault."""
    config = default_config(key.kernel, key.problem, compiler.target)
    [found] = compiler.examine([(key.kernel, key.problem, config)])
    if found.code is None:
        raise CommandError(f"{compiler.target.name}: no config passes; {key}, {config}: {'; '.join(found.reasons)}")


def _static_summary(table: Table, before: dict[EntryKey, Entry], wanted: list[Key]) -> str:
    rows = []
    for key in wanted:
        entry, old = table.entries.get(key), before.get(key)
        if entry is None:
            rows.append([key, "no config passes: the default serves", "", ""])
            continue
        known = entry.details.get("registers", "")
        changed = "" if old is None or old.config == entry.config else f"was {shown(old.config)}"
        rows.append([key, shown(entry.config), known, changed or entry.source])
    return tabulate(rows, ["key", "config", "registers", "source"], "github", disable_numparse=True)


def _gpu_here() -> tuple[torch.device, Target]:
    """Return this machine's GPU. Raises CommandError where there is none, or one that is too old."""
    if not torch.cuda.is_available():
        raise CommandError(
            "expected a GPU, got none. Without one, `--static NAME` compiles for "
            f"{', '.join(gpu.name for gpu in GPUS)}, an architecture as sm_90, or all"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    target = Target.of(device)
    if target.is_too_old:
        raise CommandError(
            f"expected a GPU of sm_80 or later, got {target.name}, for whose tensor cores Triton has no code"
        )
    return device, target


def _tune_here(options: Namespace, wanted: dict[EntryKey, Size], end: float) -> int:
    """Search on this machine's GPU; no search begins after `end`, of time.monotonic."""
    device, target = _gpu_here()
    path = _path(table_name(target), options.write)
    _check_folder(path)
    effort = QUICK if options.quick else Effort()
    todo = pending(wanted, _entries(path, target), effort)
    if len(todo) < len(wanted):
        print(f"{len(wanted) - len(todo)} of {len(wanted)} keys are measured already in {path}")
    results: list[Result] = []
    try:
        with Compiler(target, options.workers) as compiler, Bar(todo, unit="key") as progress:
            for key in progress:
                if time.monotonic() >= end:
                    print(f"the budget of {options.budget:g} minutes is spent: run the command again to go on")
                    break
                progress.set_postfix_str(str(key))
                results.append(_searched(key, wanted[key], effort, options, compiler, device))
                if results[-1].entry is not None:
                    _save(results, path, target)  # at once: Ctrl-C loses one search at most
        status = 0
    except SearchError as error:
        raise CommandError(f"{error}. {len(results)} keys were searched before, see {path}") from error
    except KeyboardInterrupt:
        print("stopped: run the command again to go on")
        status = INTERRUPTED
    print(f"\n{path}\n\n{_measured_summary(results)}")
    if wrong := [line for result in results for line in result.wrong]:
        print("\nNot taken, since results or the run were wrong:\n" + "\n".join(wrong))
    return status


def _searched(
    key: EntryKey, size: Size, effort: Effort, options: Namespace, compiler: Compiler, device: torch.device
) -> Result:
    configs = passing(key, compiler, effort)
    dtypes = (key.problem.dtype,) if options.calls else tuple(DTYPES[name] for name in options.dtypes)
    return search(key, configs, compiler.target, device, effort, size, dtypes)


def _save(results: list[Result], path: Path, target: Target) -> None:
    """Write the results into the file, with what others wrote there."""
    found = {result.key: result.entry for result in results if result.entry is not None}
    name, kernels = table_name(target), kernels_fingerprint()
    write_table(path, lambda: Table(name, target, kernels, _entries(path, target) | found))
    lookup.clear_cache()


def _measured_summary(results: list[Result]) -> str:
    rows = []
    for result in results:
        now = "" if result.entry is None else shown(result.entry.config)
        milliseconds = "" if result.timing is None else f"{result.timing.median:.4f}"
        gain = "" if result.gain is None else f"{result.gain:.3f}x"
        rows.append([result.key, shown(result.before), now, milliseconds, gain])
    return tabulate(rows, ["key", "before", "now", "ms", "gain"], "github", disable_numparse=True)
