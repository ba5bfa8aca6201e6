"""Tables without a GPU: each entry is the config that passes the gate and ranks first in the model."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context

import triton

from ..tuning.config import TILED_KERNELS, Problem, Target, TileConfig, padded_dim
from ..tuning.defaults import default_config
from ..tuning.gpus import GPU
from ..tuning.ptxas import ptxas_version
from ..tuning.table import HEAD_DIMS, LENGTHS, SCALES, Entry, Key, Table, kernels_fingerprint
from .candidates import static_candidates
from .gate import Candidate, examine, modelled_clocks

# A config replaces the default, or for long calls that of short ones, which then need no kernels of their own, only if
# it leads by this much in the model, which is no measurement.
_CLEARLY_AHEAD = 0.95

Compiled = dict[tuple[str, Problem, TileConfig], Candidate]
Progress = Callable[[int], object]


def keys(kernels: tuple[str, ...] = TILED_KERNELS, head_dims: tuple[int, ...] = HEAD_DIMS) -> Iterator[Key]:
    for kernel in kernels:
        for head_dim in head_dims:
            yield from (Key(kernel, head_dim, scales, lengths) for scales in SCALES[kernel] for lengths in LENGTHS)


class Compiler:
    """Examines configs in processes, each once for all lengths and for all cards of an architecture."""

    def __init__(self, target: Target, workers: int) -> None:
        self.target = target
        self.examined: Compiled = {}
        self._pool = ProcessPoolExecutor(workers, get_context("spawn"), _quiet)

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)

    def examine(
        self, wanted: list[tuple[str, Problem, TileConfig]], progress: Progress | None = None
    ) -> list[Candidate]:
        wanted = [(kernel, replace(problem, short=False), config) for kernel, problem, config in wanted]
        new = [one for one in dict.fromkeys(wanted) if one not in self.examined]
        with _without_interrupts():
            tasks = {self._pool.submit(examine, *one, self.target): one for one in new}
        for task in as_completed(tasks):
            self.examined[tasks[task]] = task.result()
            if progress:
                progress(1)
        return [self.examined[one] for one in wanted]


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back, also from processes that start inside: it would end their imports with a traceback each."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _quiet() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a terminal sends Ctrl-C to all processes; this one ends silently
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def static_table(gpu: GPU, compiler: Compiler, wanted: list[Key], progress: Progress | None = None) -> Table:
    """Make the table of a GPU, with entries for the wanted keys for which some config passes."""
    _compile_ahead(gpu, compiler, wanted, progress)
    entries = {}
    for key in wanted:
        if found := _first_that_passes(gpu, compiler, key, progress):
            code = found.code
            assert code is not None
            details = {
                **compiler_versions(gpu.target),
                "registers": code.registers,
                "spill_bytes": code.spill_bytes,
                "shared_bytes": code.shared_bytes,
            }
            entries[key] = Entry(found.config, "static", details)
    return Table(gpu.name, gpu.target, kernels_fingerprint(), entries)


def compiler_versions(target: Target) -> dict[str, str]:
    """Name the versions that made the code of an entry."""
    versions = {"triton": triton.__version__}
    return versions | {"ptxas": ptxas_version(int(target.arch))} if target.backend == "cuda" else versions


def _typical(key: Key) -> Problem:
    """Return the problem by which configs of a key are ranked: the padded width, with query_scale."""
    return key._replace(head_dim=padded_dim(key.head_dim), scales="query").problem


def _contenders(key: Key, target: Target) -> list[tuple[str, Problem, TileConfig]]:
    """List the configs that the ranking of a key examines, its own default first."""
    problem = _typical(key)
    configs = [default_config(key.kernel, key.problem, target), *static_candidates(key.kernel, problem, target)]
    return [(key.kernel, problem, config) for config in dict.fromkeys(configs)]


def _compile_ahead(gpu: GPU, compiler: Compiler, wanted: list[Key], progress: Progress | None) -> None:
    """Examine in parallel the contenders of all keys, and then the first of each."""
    compiler.examine([one for key in wanted for one in _contenders(key, gpu.target)], progress)
    first = [(key.kernel, key.problem, config) for key in wanted for config in ranked(gpu, compiler, key)[:1]]
    compiler.examine(first, progress)


def ranked(gpu: GPU, compiler: Compiler, key: Key) -> list[TileConfig]:
    """Rank the configs that pass for a typical call of a key, the most promising first."""
    contenders = _contenders(key, gpu.target)
    clocks = {
        one.config: modelled_clocks(key.kernel, _typical(key), one, gpu.target, gpu.processors)
        for one in compiler.examine(contenders)
        if not one.reasons
    }
    [(_, _, default), *_] = contenders
    preferred = {default}
    if key.lengths == "long":
        preferred.update(ranked(gpu, compiler, key._replace(lengths="short"))[:1])
    for config in preferred & clocks.keys():
        clocks[config] *= _CLEARLY_AHEAD
    return sorted(clocks, key=clocks.__getitem__)


def _first_that_passes(gpu: GPU, compiler: Compiler, key: Key, progress: Progress | None) -> Candidate | None:
    for config in ranked(gpu, compiler, key):
        [found] = compiler.examine([(key.kernel, key.problem, config)], progress)
        if not found.reasons:
            return found
    return None
