"""Arguments that are to be the same on every rank: compared once for each signature of a call, and refused by name."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.parallel import parallelize_module

from tests.distributed.pool import on_every_rank
from tests.distributed.test_context_parallel import mesh_of
from tests.support.refusals import refuses
from tritonattn import Scales, Scaling
from tritonattn.distributed import (
    ContextParallel,
    agreement,
    context_parallel_attention,
    context_parallel_decode,
    shard,
    unshard,
)
from tritonattn.nn import ForgetGate, LearnedLogPower, PerHead, PowerLaw, SSMax
from tritonattn.scaling import LogKeyCount

HEADS = 4


class Doubled(Scaling):
    """A user's mode that holds a tensor: 2."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def scales(self, q, k, visibility, statistics):
        return Scales(2.0)


class Other(PowerLaw):
    """Another class with the same settings."""


@on_every_rank
def test_ranks_that_differ_raise_by_name(rank: int) -> None:
    """One rank calls otherwise: every rank raises, by the argument's name; in later calls at the debug level DETAIL."""
    mesh = mesh_of(dist.get_world_size())
    torch.manual_seed(0)
    x = shard(torch.randn(2, HEADS, 48, 8), mesh=mesh)
    cache = {"key_lengths": torch.tensor([40, 48]), "window": (9, 0)}

    def attend(x=x, key_heads=HEADS, with_gradients=True, **options):
        with torch.set_grad_enabled(with_gradients):
            return context_parallel_attention(x, x[:, :key_heads], x[:, :key_heads], mesh=mesh, **options)

    def decoded(x=x, **options):
        return context_parallel_decode(x[:, :, :1], x, x, mesh=mesh, **cache | options)

    def gated(layout):
        return parallelize_module(ForgetGate(8, HEADS), mesh, ContextParallel(layout=layout))(x[:, 0])

    trained, s, frozen = x.clone().requires_grad_(), SSMax(HEADS), SSMax(HEADS).requires_grad_(False)
    nested = [PerHead(mode(heads=HEADS), heads=HEADS) for mode in (PowerLaw, Other)]
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
        ("layout", gated, {"layout": "contiguous"}, {"layout": "zigzag"}),
        ("q", attend, {}, {"x": trained}),
        ("q", attend, {"x": trained, "causal": True}, {"x": trained, "causal": True, "with_gradients": False}),
        ("x", lambda x: unshard(x, mesh=mesh), {"x": x}, {"x": trained}),
        ("sinks", attend, {"sinks": torch.ones(HEADS)}, {"sinks": torch.ones(HEADS, requires_grad=True)}),
        ("scaling", attend, {"scaling": s}, {"scaling": frozen}),
        ("scaling", attend, {"scaling": Doubled(trained)}, {"scaling": Doubled(x)}),
        ("scaling", attend, {"scaling": nested[0]}, {"scaling": nested[1]}),
    ]
    for level in (dist.DebugLevel.OFF, dist.DebugLevel.DETAIL):
        dist.set_debug_level(level)
        for name, call, theirs, mine in faults:
            message = f"ValueError: {name}: expected the same on every rank of the mesh, got ~ on rank"
            refuses(message, call, **mine if rank == 1 else theirs)
        for _, call, theirs, _ in faults:
            call(**theirs)
    dist.set_debug_level(dist.DebugLevel.OFF)
    message = "ValueError: function: ~ got context_parallel_attention on ranks 0, 2, 3 and unshard on rank 1"
    refuses(message, lambda: unshard(x, mesh=mesh, dim=1) if rank == 1 else attend(softcap=3.0))


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
        for _ in range(2):
            context_parallel_attention(x.requires_grad_(), x, x, mesh=mesh, scaling=LogKeyCount(2.0))
        assert len(comparisons) == 5
        torch.compile(unshard, backend="eager")(x, mesh=mesh)
    assert len(comparisons) == 5


@on_every_rank
def test_equal_numbers_of_other_types_agree(rank: int) -> None:
    mesh, number, refused = mesh_of(2), (int, float)[rank % 2], []
    x = torch.randn(1, 2, 8, 4)
    for scaling in (number(1), LogKeyCount(number(4))):
        try:
            context_parallel_attention(x, x, x, mesh=mesh, scaling=scaling, gain=number(2), softcap=number(9))
        except ValueError as error:
            refused.append(error)
    assert not refused
