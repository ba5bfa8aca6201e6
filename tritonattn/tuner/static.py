"""Tables without a GPU: of each key the first config whose code passes the gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..tuning.config import Problem, Target, TileConfig, shared_limit
from ..tuning.gpus import GPU
from ..tuning.lookup import config_for
from ..tuning.table import SCALES, Entry, Key, Table, kernels_fingerprint
from .candidates import candidates
from .gate import Candidate, Compiler, Progress, compiler_versions

# The configs of a key on a card, the most promising first.
Rank = Callable[[GPU, Compiler, Key], list[TileConfig]]


def in_use_first(gpu: GPU, compiler: Compiler, key: Key) -> list[TileConfig]:
    """List the config that a call takes on a card now, then the default, then the other candidates."""
    card = gpu.target._replace(card=" ".join(gpu.words))
    in_use = config_for(key.kernel, key.problem, card)
    return list(dict.fromkeys([in_use, *candidates(key.kernel, key.problem, gpu.target)]))


def static_table(
    gpu: GPU, compiler: Compiler, wanted: list[Key], ranked: Rank, progress: Progress | None = None
) -> Table:
    """Make the table of a GPU, with entries for the wanted keys for which some config passes.

    It passes for the key's call, and fits with every option that such a call may have.
    """
    ranks = {key: ranked(gpu, compiler, key) for key in wanted}
    compiler.examine([one for key, configs in ranks.items() for one in _calls(key, configs[0])], progress)
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
    own = key._replace(scales=SCALES[key.kernel][-1]).problem
    return replace(own, left=True, key_bias=True, softcap=True, aux=key.kernel == "forward", sinks=True)


def fits(found: Candidate, target: Target) -> bool:
    return found.code is not None and found.code.shared_bytes <= shared_limit(target)
