"""The config of a call: from the user's table, this GPU's, the nearest of its architecture, else a default."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import triton

from . import cache_dir
from .config import Problem, Target, TileConfig, legal_reasons, one_line
from .defaults import GLUON, default_config, gluon_config
from .fingerprint import kernels_fingerprint
from .gpus import nearest, table_name
from .table import Entry, EntryKey, Exact, Table, TableError, keys_of, read_table

# Asks for the forward in Gluon wherever it is legal, with 1; read where a problem is new.
FORCE_GLUON = "TRITONATTN_GLUON"

# Configs that a compiler or a card refused although they are legal by the estimates.
_rejected: set[tuple[str, Problem, Target, TileConfig]] = set()


class ChosenConfig(NamedTuple):
    """A config, and the file, key and entry that it comes from; None is the built-in default, or FORCE_GLUON's."""

    config: TileConfig
    path: Path | None = None
    key: EntryKey | None = None
    entry: Entry | None = None

    @property
    def is_of_another_triton(self) -> bool:
        """True where another version compiled the entry than will run it: then its code is held to a gate."""
        return self.entry is not None and self.entry.triton != triton.__version__


def config_for(kernel: str, problem: Problem, target: Target) -> TileConfig:
    """The config that a call runs with; configs that are not legal for it are skipped."""
    return find(kernel, problem, target).config


def find(kernel: str, problem: Problem, target: Target) -> ChosenConfig:
    """`config_for`, and where it was found. Files are read once a process and target."""
    for found in _found(kernel, problem, target):
        if (kernel, problem, target, found.config) in _rejected:
            continue
        reasons = legal_reasons(kernel, found.config, problem, target)
        if not reasons:
            return found
        if found.config.kernel == "gluon":
            _warn_of_gluon("; ".join(reasons))
    return ChosenConfig(default_config(kernel, problem, target))


def _found(kernel: str, problem: Problem, target: Target) -> Iterator[ChosenConfig]:
    """Configs that are asked for in turn, some perhaps illegal for the call."""
    if kernel == "forward" and os.environ.get(FORCE_GLUON) == "1" and not problem.invariant:
        yield ChosenConfig(gluon_config(problem, target) or GLUON)
    keys = () if problem.invariant else (Exact(kernel, problem), *keys_of(kernel, problem, target))
    for key in keys:
        yield from _entries(target).get(key, ())


@functools.cache
def _warn_of_gluon(reasons: str) -> None:
    """Say once why a kernel in Gluon that was asked for does not run."""
    warnings.warn(f"tritonattn runs its other forward where Gluon's is asked for: {reasons}", stacklevel=2)


def reject_config(kernel: str, problem: Problem, target: Target, config: TileConfig, why: Exception) -> bool:
    """Skip a table's config from now on, with a warning; return False if the config in use comes from no table."""
    found = find(kernel, problem, target)
    is_default = found.path is None and config.kernel == "triton"
    if is_default or found.config != config:
        return False
    _rejected.add((kernel, problem, target, config))
    what = f"{found.path or FORCE_GLUON}: {found.key or kernel}: {config}: {one_line(why)}"
    warnings.warn(f"tritonattn skips a tuned config: {what}", stacklevel=2)
    return True


def problems(target: Target) -> list[Exact]:
    """The single problems that have entries."""
    return [key for key in _entries(target) if isinstance(key, Exact)]


def refuse_spills(kernel: str, problem: Problem, target: Target, config: TileConfig, spills: int) -> bool:
    """Skip a config of another Triton whose code, now compiled, spills; return whether it did.

    The gate lets code spill outside of loops, which only a search tells from others. Its other conditions follow from
    the config, or no launch would succeed.
    """
    found = find(kernel, problem, target)
    if not spills or found.config != config or found.entry is None or not found.is_of_another_triton:
        return False
    why = f"triton {triton.__version__} spills {spills} registers, found with triton {found.entry.triton}: tune again"
    return reject_config(kernel, problem, target, config, RuntimeError(why))


def clear_cache() -> None:
    """Read the files again at the next lookup; the plans of `launch` keep what they were made with."""
    _entries.cache_clear()
    _warn_of_gluon.cache_clear()
    _rejected.clear()


def paths(target: Target) -> list[Path]:
    """The files that may hold a table for a target, in the order of the search; they need not exist."""
    name = table_name(target)
    try:
        shipped = cache_dir.shipped_tables()
    except FileNotFoundError:
        shipped = None
    relatives = [gpu.name for gpu in nearest(target) if gpu.name != name]
    found = []
    with suppress(RuntimeError):  # a user without a home
        found = [user_table(target)] if name else []
    if shipped is not None:
        found += [shipped / f"{stem}.json" for stem in ([name] if name else []) + relatives]
    return found


def user_table(target: Target) -> Path:
    """The file that `tritonattn tune` writes for a target's card."""
    return cache_dir.user_cache() / "autotune" / f"{table_name(target)}.json"


def faster_library(target: Target) -> str:
    """The library of backend "flash" that a table of this very card names, or ""."""
    for path in paths(target):
        if path.stem == table_name(target):
            with suppress(FileNotFoundError, TableError):  # a faulty one is reported where its entries are read
                if name := usable_table(path, target).faster:
                    return name
    return ""


def usable_table(path: Path, target: Target) -> Table:
    """The table in a file, if it is for this GPU, architecture and kernels. Raises TableError, FileNotFoundError."""
    table = read_table(path)
    if table.gpu != path.stem:
        raise TableError(f"{path}: gpu: expected {path.stem}, got {table.gpu[:40]!r}")
    if table.target[:2] != target[:2]:
        raise TableError(f"{path}: target: expected {target.name}, got {table.target.name}")
    if not table.is_of_these_kernels:
        expected = f"expected {kernels_fingerprint()}, got {table.kernels[:40]!r}"
        raise TableError(f"{path}: kernels: {expected}: of other kernels, tune again")
    return table


@functools.lru_cache(maxsize=64)
def _entries(target: Target) -> dict[EntryKey, tuple[ChosenConfig, ...]]:
    """The entries of all files, in the order of the search; a file that cannot be used is reported once and skipped."""
    merged: dict[EntryKey, tuple[ChosenConfig, ...]] = {}
    for path in paths(target):
        try:
            table = usable_table(path, target)
        except FileNotFoundError:
            continue
        except TableError as error:
            warnings.warn(f"tritonattn skips a table of tuned configs: {error}", stacklevel=2)
            continue
        for key, entry in table.entries.items():
            if not entry.is_of_these_kernels:
                _warn_of_gluon(f"{path}: {key}: of another such kernel, tune again")
                continue
            merged[key] = (*merged.get(key, ()), ChosenConfig(entry.config, path, key, entry))
    return merged
