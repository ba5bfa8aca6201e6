"""Tables without a GPU: each entry is the config that passes the gate and ranks first in the model."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import triton

from ..tuning.config import TILED_KERNELS, Problem, Target, TileConfig, padded_dim, shared_limit
from ..tuning.defaults import default_config
from ..tuning.gpus import GPU
from ..tuning.ptxas import ptxas_version
from ..tuning.table import HEAD_DIMS, LENGTHS, SCALES, Entry, Key, Table, kernels_fingerprint
from .candidates import few_candidates, static_candidates, tiles
from .gate import Candidate, LatencyModel, examine, modelled_clocks

# A config replaces the default, or for long calls that of short ones, which then need no kernels of their own, only if
# it leads by this much in the model, which is no measurement.
_CLEARLY_AHEAD = 0.95
# Tiles of which a ranking also compiles the other numbers of stages.
_REFINED = 4

Compiled = dict[tuple[str, Problem, TileConfig], Candidate]
Progress = Callable[[int], object]


def keys(kernels: tuple[str, ...] = TILED_KERNELS, head_dims: tuple[int, ...] = HEAD_DIMS) -> Iterator[Key]:
    for kernel in kernels:
        for head_dim in head_dims:
            yield from (Key(kernel, head_dim, scales, lengths) for scales in SCALES[kernel] for lengths in LENGTHS)


class Compiler:
    """Examines configs in processes, each once for all lengths and for all cards of an architecture.

    model   of latency, a function that processes can import
    """

    def __init__(self, target: Target, workers: int, model: LatencyModel | None = None) -> None:
        self.target = target
        self._examine = partial(examine, model=model)
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
            tasks = {self._pool.submit(self._examine, *one, self.target): one for one in new}
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
            if found.latency is not None:
                details["modelled_share"] = round(found.latency.share, 3)
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
    """List the configs by which a key's tiles are compared, its own default first: in as many stages as the default."""
    problem = _typical(key)
    few = few_candidates(key.kernel, problem, target)
    configs = dict.fromkeys([default_config(key.kernel, key.problem, target), *few])
    return [(key.kernel, problem, config) for config in configs]


def _refined(gpu: GPU, compiler: Compiler, key: Key) -> list[tuple[str, Problem, TileConfig]]:
    """List the other stages of the most promising tiles, and of those that did not fit with as many."""
    problem, contenders = _typical(key), _contenders(key, gpu.target)
    clocks = _clocks(gpu, compiler, key, contenders)
    best = list(dict.fromkeys(tiles(config) for config in sorted(clocks, key=clocks.__getitem__)))[:_REFINED]
    too_large = [tiles(one.config) for one in compiler.examine(contenders) if one.code and not _fits(one, gpu.target)]
    others = static_candidates(key.kernel, problem, gpu.target)
    return [(key.kernel, problem, config) for config in others if tiles(config) in (*best, *too_large)]


def _compile_ahead(gpu: GPU, compiler: Compiler, wanted: list[Key], progress: Progress | None) -> None:
    """Examine in parallel the contenders of all keys, then other stages of the best, and then the first of each."""
    compiler.examine([one for key in wanted for one in _contenders(key, gpu.target)], progress)
    compiler.examine([one for key in wanted for one in _refined(gpu, compiler, key)], progress)
    first = [
        (key.kernel, problem, config)
        for key in wanted
        for config in ranked(gpu, compiler, key)[:1]
        for problem in (key.problem, _fullest(key))
    ]
    compiler.examine(first, progress)


def _clocks(
    gpu: GPU, compiler: Compiler, key: Key, contenders: list[tuple[str, Problem, TileConfig]]
) -> dict[TileConfig, float]:
    """Model the clocks of a typical call in each config that passes."""
    return {
        one.config: modelled_clocks(key.kernel, _typical(key), one, gpu.target, gpu.processors)
        for one in _in_time(compiler.examine(contenders))
    }


def _in_time(examined: list[Candidate]) -> list[Candidate]:
    """Leave out what does not pass, and what asks for its loads too late where another stage fits."""
    passing = {one.config: one for one in examined if not one.reasons}

    def has_better(one: Candidate) -> bool:
        longer = passing.get(replace(one.config, num_stages=one.config.num_stages + 1))
        if longer is None or longer.latency is None or one.latency is None:
            return False
        is_late = one.latency.awaits_last and not longer.latency.awaits_last
        return is_late and longer.latency.programs >= one.latency.programs

    return [one for one in passing.values() if not has_better(one)]


def ranked(gpu: GPU, compiler: Compiler, key: Key) -> list[TileConfig]:
    """Rank the configs that pass for a typical call of a key, the most promising first."""
    contenders = _contenders(key, gpu.target)
    clocks = _clocks(gpu, compiler, key, [*contenders, *_refined(gpu, compiler, key)])
    [(_, _, default), *_] = contenders
    preferred = {default}
    if key.lengths == "long":
        preferred.update(ranked(gpu, compiler, key._replace(lengths="short"))[:1])
    for config in preferred & clocks.keys():
        clocks[config] *= _CLEARLY_AHEAD
    return sorted(clocks, key=clocks.__getitem__)


def _first_that_passes(gpu: GPU, compiler: Compiler, key: Key, progress: Progress | None) -> Candidate | None:
    for config in ranked(gpu, compiler, key):
        found, fullest = compiler.examine([(key.kernel, one, config) for one in (key.problem, _fullest(key))], progress)
        if not found.reasons and _fits(fullest, gpu.target):
            return found
    return None


def _fullest(key: Key) -> Problem:
    """Return the call of a key that takes most shared memory: with every vector and statistic that it may have."""
    own = key._replace(scales=SCALES[key.kernel][-1]).problem
    return replace(own, left=True, key_bias=True, softcap=True, aux=key.kernel == "forward", sinks=True)


def _fits(found: Candidate, target: Target) -> bool:
    return found.code is not None and found.code.shared_bytes <= shared_limit(target)
