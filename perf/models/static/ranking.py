"""Tables ranked by a model: each entry is the config that passes the gate and comes first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tritonattn.autotune.candidates import candidates, tiles
from tritonattn.autotune.gate import Compiler, Progress
from tritonattn.autotune.tune import fits, static_table
from tritonattn.tuning.config import OPTIONS, Problem, Target, TileConfig, may_use_descriptors, padded_dim
from tritonattn.tuning.defaults import default_config
from tritonattn.tuning.gpus import GPU
from tritonattn.tuning.table import Key, Table

from .gate import Judged, modelled_clocks

# A config replaces the default, or for long calls that of short ones, which then need no other kernels, only if
# it leads by this much in the model, which is no measurement.
_CLEARLY_AHEAD = 0.95
# Tiles of which a ranking also compiles the other numbers of stages.
_REFINED = 4


def ranked_table(gpu: GPU, compiler: Compiler, wanted: list[Key], progress: Progress | None = None) -> Table:
    """Make the table of a GPU: examine in parallel the contenders of all keys, then other stages of the best."""
    compiler.examine([one for key in wanted for one in _contenders(key, gpu.target)], progress)
    compiler.examine([one for key in wanted for one in _refined(gpu, compiler, key)], progress)
    return static_table(gpu, compiler, wanted, progress, ranked)


def static_candidates(kernel: str, problem: Problem, target: Target) -> list[TileConfig]:
    """List the candidates for a ranking by a model, the default first: those with descriptors, where there are some.

    OPTIONS are left to a card: they change how instructions are ordered or overlap, and a model counts them.
    """
    default, *others = candidates(kernel, problem, target)
    described = may_use_descriptors(kernel, problem, target)
    return [default, *(one for one in others if one.descriptors == described and one == replace(one, **OPTIONS))]


def _few_candidates(kernel: str, problem: Problem, target: Target) -> list[TileConfig]:
    """List the default, and of the static candidates of each tile the one nearest to 2 stages.

    For decoding, which waits for memory, those with the default's stages.
    """
    first, *others = static_candidates(kernel, problem, target)
    of_tiles: dict[tuple[int, int, int], TileConfig] = {}
    for one in sorted(others, key=lambda one: abs(one.num_stages - 2)):
        if kernel != "decode" or one.num_stages == first.num_stages:
            of_tiles.setdefault(tiles(one), one)
    return [first, *of_tiles.values()]


def _typical(key: Key) -> Problem:
    """Return the problem by which configs of a key are ranked: the padded width, with query_scale."""
    return key._replace(head_dim=padded_dim(key.head_dim), scales="query").problem


def _contenders(key: Key, target: Target) -> list[tuple[str, Problem, TileConfig]]:
    """List the configs by which a key's tiles are compared, the default first: in as many stages as the default."""
    problem = _typical(key)
    few = _few_candidates(key.kernel, problem, target)
    configs = dict.fromkeys([default_config(key.kernel, key.problem, target), *few])
    return [(key.kernel, problem, config) for config in configs]


def _refined(gpu: GPU, compiler: Compiler, key: Key) -> list[tuple[str, Problem, TileConfig]]:
    """List the other stages of the most promising tiles, and of those that did not fit with as many."""
    problem, contenders = _typical(key), _contenders(key, gpu.target)
    clocks = _clocks(gpu, compiler, key, contenders)
    best = list(dict.fromkeys(tiles(config) for config in sorted(clocks, key=clocks.__getitem__)))[:_REFINED]
    too_large = [tiles(one.config) for one in compiler.examine(contenders) if one.code and not fits(one, gpu.target)]
    others = static_candidates(key.kernel, problem, gpu.target)
    return [(key.kernel, problem, config) for config in others if tiles(config) in (*best, *too_large)]


def _clocks(
    gpu: GPU, compiler: Compiler, key: Key, contenders: list[tuple[str, Problem, TileConfig]]
) -> dict[TileConfig, float]:
    """Model the clocks of a typical call in each config that passes."""
    return {
        one.config: modelled_clocks(key.kernel, _typical(key), one, gpu)
        for one in _in_time(compiler.examine(contenders))
    }


def _in_time(examined: list[Any]) -> list[Judged]:
    """Leave out what does not pass, and what asks for its loads too late where another stage fits."""
    passing = {one.config: one for one in examined if not one.reasons}

    def is_in_time(longer: Judged, one: Judged) -> bool:
        if longer.latency is None or one.latency is None:
            return False
        has_more = tiles(longer.config) == tiles(one.config) and longer.config.num_stages > one.config.num_stages
        is_late = one.latency.awaits_last and not longer.latency.awaits_last
        return has_more and is_late and longer.latency.programs >= one.latency.programs

    def has_better(one: Judged) -> bool:
        return any(is_in_time(longer, one) for longer in passing.values())

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
