"""Arguments that are to be the same on every rank: compared once for each signature of a call, and refused by name."""

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.pool import on_every_rank
from tests.distributed.test_context_parallel import mesh_of
from tritonattn.distributed import agreement, context_parallel_attention, context_parallel_decode, shard, unshard
from tritonattn.nn import LearnedLogPower, SSMax
from tritonattn.scaling import LogKeyCount

HEADS = 4


@on_every_rank
def test_ranks_that_differ_raise_by_name(rank: int) -> None:
    """One rank calls otherwise: every rank raises, by the argument's name; in later calls at the debug level DETAIL."""
    mesh = mesh_of(dist.get_world_size())
    torch.manual_seed(0)
    x = shard(torch.randn(2, HEADS, 48, 8), mesh=mesh)
    cache = {"key_lengths": torch.tensor([40, 48]), "window": (9, 0)}

    def attend(x=x, key_heads=HEADS, **options):
        return context_parallel_attention(x, x[:, :key_heads], x[:, :key_heads], mesh=mesh, **options)

    def decoded(x=x, **options):
        return context_parallel_decode(x[:, :, :1], x, x, mesh=mesh, **cache | options)

    faults: list[tuple[str, Any, dict[str, Any], dict[str, Any]]] = [
        ("q", attend, {}, {"x": x[:, :, :4]}),
        ("q", attend, {}, {"x": x.transpose(1, 2)}),
        ("q", attend, {"x": x.half()}, {"x": x.bfloat16()}),
        ("q", attend, {"key_heads": 2}, {"key_heads": 2, "x": x[:, :2]}),
        ("k", attend, {}, {"key_heads": 2}),
        ("causal", attend, {}, {"causal": True}),
        ("scaling", attend, {}, {"scaling": "cosine"}),
        ("scaling", attend, {"scaling": LogKeyCount(base=2.0)}, {"scaling": LogKeyCount(base=4.0)}),
        ("scaling", attend, {"scaling": LearnedLogPower(HEADS, base=8)}, {"scaling": LearnedLogPower(HEADS, base=9)}),
        ("sinks", attend, {}, {"sinks": torch.zeros(HEADS)}),
        ("method", attend, {}, {"method": "ring"}),
        ("window", decoded, {}, {"window": None}),
        ("layout", lambda **cut: unshard(x, mesh=mesh, **cut), {}, {"layout": "zigzag"}),
    ]
    for level in (dist.DebugLevel.OFF, dist.DebugLevel.DETAIL):
        dist.set_debug_level(level)
        for name, call, theirs, mine in faults:
            message = rf"^{name}: expected the same on every rank of the mesh, got .* on rank"
            with pytest.raises(ValueError, match=message):
                call(**mine if rank == 1 else theirs)
        for _, call, theirs, _ in faults:
            call(**theirs)
    dist.set_debug_level(dist.DebugLevel.OFF)
    message = re.escape(
        "function: expected the same on every rank of the mesh, got context_parallel_attention on ranks 0, 2, 3 and"
        " unshard on rank 1"
    )
    with pytest.raises(ValueError, match=message):
        unshard(x, mesh=mesh, dim=1) if rank == 1 else attend(softcap=3.0)


@on_every_rank
def test_arguments_are_compared_once(rank: int) -> None:
    """A signature of a call is compared once, whatever values its tensors have, and never while a compiler traces."""
    mesh, comparisons = mesh_of(2), []
    with pytest.MonkeyPatch.context() as patch:
        compare = agreement._compare
        patch.setattr(agreement, "_compare", lambda *call: (comparisons.append(call), compare(*call)))
        for length in (8, 8, 16, 8):
            x = torch.randn(1, 2, length, 8)
            context_parallel_attention(x, x, x, mesh=mesh, scaling=SSMax(heads=2), window=[3, 0])
        assert len(comparisons) == 2
        for base in (2.0, 4.0, 2.0):
            context_parallel_attention(x, x, x, mesh=mesh, scaling=LogKeyCount(base))
        assert len(comparisons) == 4
        torch.compile(unshard, backend="eager")(x, mesh=mesh)
    assert len(comparisons) == 4
