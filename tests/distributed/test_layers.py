"""Layers of `tritonattn.nn` on a sequence that ranks share: results and gradients are those of one process."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import tritonattn
from tests.distributed.pool import on_every_rank
from tests.support.refusals import refuses
from tritonattn.core.torch_distributed import whole
from tritonattn.distributed import (
    ContextParallel,
    HeadParallel,
    context_parallel_attention,
    context_parallel_decode,
    pad,
    shard,
    unshard,
)
from tritonattn.nn import ALiBi, ForgetGate, KeyValueCache, ScaledAttention, counted_from_rows

WIDTH, HEADS, LENGTH = 16, 4, 22
ENDS = torch.tensor([0, 7, 8, 22, 24], dtype=torch.int32)  # documents, and padding to a multiple of the chunks
WHOLE = {"batched": (2, LENGTH, WIDTH), "packed": (LENGTH, WIDTH)}


def meshes() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))


class Block(nn.Module):
    def __init__(self, tensor: bool) -> None:
        super().__init__()
        options = {"kv_heads": 2, "scaling": "ssmax" if tensor else "key_norm_mean", "sinks": True, "causal": True}
        options |= {"gate": "headwise" if tensor else "elementwise", "qk_norm": not tensor}
        self.attention = ScaledAttention(WIDTH, HEADS, **options, rotary=1e4, dtype=torch.float64)
        self.gate = ForgetGate(WIDTH, HEADS, dtype=torch.float64)
        self.alibi = None if tensor else ALiBi(HEADS)

    def forward(self, x: Tensor, **packing: Any) -> Tensor:
        bias = self.gate(x)
        if self.alibi is not None:
            bias = counted_from_rows(bias + 30 * self.alibi(x.shape[-2]).double())
        return self.attention(x, key_bias=bias, **packing)


def layers(rank: int, form: str, layout: str, method: str, tensor: bool = False) -> dict[str, float]:
    """Errors of a block's output and gradients, relative to the largest value of each; 2 ranks share the tokens."""
    torch.manual_seed(0)
    mesh, cut = meshes(), {"mesh": meshes()["cp"], "layout": layout, "dim": -2}
    one = Block(tensor)
    nn.init.normal_(one.attention.sinks)
    shared, x = copy.deepcopy(one), torch.randn(WHOLE[form], dtype=torch.float64, requires_grad=True)
    packing = {"cu_seqlens": ENDS, "max_seqlen": 14} if form == "packed" else {}
    if tensor:
        plan = {f"attention.{name}_proj": ColwiseParallel() for name in "qkvg"}
        plan |= {"attention.o_proj": RowwiseParallel(), "attention.scaling": HeadParallel()}
        plan |= {"attention": HeadParallel("sinks"), "gate.proj": ColwiseParallel()}
        parallelize_module(shared, mesh["tp"], plan)
    parallelize_module(shared, mesh["cp"], ContextParallel(layout=layout, method=method))
    padded = pad(x, **cut)
    wanted = one(padded, **packing)
    d_out = torch.randn(wanted.shape, dtype=torch.float64)
    d_out.narrow(-2, LENGTH, d_out.shape[-2] - LENGTH).zero_()  # a loss does not count the padding
    (dx,) = torch.autograd.grad(wanted, x, d_out, retain_graph=True)
    wanted.backward(d_out)
    part = shard(padded, **cut).detach().requires_grad_()
    got = shared(part, **packing)
    got.backward(shard(d_out, **cut))
    pairs = {"out": (unshard(got.detach(), **cut), wanted)}
    pairs["x"] = unshard(part.grad, **cut).narrow(-2, 0, LENGTH), dx
    theirs = dict(one.named_parameters())
    for name, parameter in shared.named_parameters():
        gradient = whole(parameter.grad).contiguous()
        dist.all_reduce(gradient, group=mesh["cp"].get_group())
        pairs[name] = gradient, theirs[name].grad
    return {name: ((a - b).abs().max() / b.abs().max()).item() for name, (a, b) in pairs.items()}


@pytest.mark.parametrize(
    ("form", "layout", "method", "tensor"),
    [
        ("batched", "zigzag", "allgather", False),
        ("batched", "contiguous", "alltoall", False),
        ("packed", "zigzag", "ring", False),
        ("batched", "zigzag", "allgather", True),
    ],
)
def test_a_layer_its_gates_and_its_positions_are_those_of_one_process(pool, form, layout, method, tensor):
    for found in pool.run(layers, form, layout, method, tensor):
        assert max(found.values()) < 1e-12, found


@on_every_rank
def test_alibi_of_a_rank_is_its_part_of_the_whole_sequences(rank: int) -> None:
    """The last key of the sequence has the bias 0, on whichever rank it lies."""
    mesh, tokens = meshes()["cp"], 24
    for layout in ("contiguous", "zigzag"):
        alibi = parallelize_module(ALiBi(HEADS), mesh, ContextParallel(layout=layout))
        expected = shard(ALiBi(HEADS)(tokens), mesh=mesh, layout=layout, dim=-1)
        torch.testing.assert_close(alibi(tokens // 2), expected, rtol=0, atol=0)


@on_every_rank
def test_what_head_parallel_has_sharded_goes_with_plain_operands(rank: int) -> None:
    """Gain and sinks as DTensors with plain q are those of this rank's heads, gradients included."""
    torch.manual_seed(0)
    mesh, part = meshes(), slice(2 * (rank % 2), 2 * (rank % 2) + 2)
    q, k, v, gain, sinks = *torch.randn(3, 1, 2, 8, 4), torch.rand(HEADS, 1), torch.randn(HEADS)
    lengths = torch.tensor([16])
    results = []
    for is_sharded in (False, True):
        shared = [gain[part].clone(), sinks[part].clone()]
        if is_sharded:
            shared = [distribute_tensor(x, mesh["tp"], [Shard(0)]) for x in (gain, sinks)]
        given = dict(zip(("gain", "sinks"), (x.requires_grad_() for x in shared), strict=True))
        out = context_parallel_attention(q, k, v, mesh=mesh["cp"], **given)
        out.square().sum().backward()
        found = [out, *(whole(x.grad)[part] if is_sharded else x.grad for x in shared)]
        with torch.no_grad():
            found.append(context_parallel_decode(q[:, :, :1], k, v, mesh=mesh["cp"], key_lengths=lengths, **given))
        results.append(found)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises(ValueError, match="sinks: expected a value for each of q's 2 heads on this rank, got 1 of 2"):
        context_parallel_attention(q, k, v, mesh=mesh["cp"], sinks=distribute_tensor(sinks[:2], mesh["tp"], [Shard(0)]))


@on_every_rank
def test_a_layer_over_ranks_refuses_by_name(rank: int) -> None:
    """A layer over ranks refuses what says nothing of the whole sequence, and gates refuse torch's context."""
    mesh, x = meshes()["cp"], torch.randn(1, 8, WIDTH)
    layer = ScaledAttention(WIDTH, HEADS, causal=True, dropout_p=0.5)
    plain, gate, alibi = copy.deepcopy(layer), ForgetGate(WIDTH, HEADS), ALiBi(HEADS)
    for module in (layer, gate):
        parallelize_module(module, mesh, ContextParallel(layout="zigzag"))
    assert copy.deepcopy(layer).sequence_part is not None
    refuses("NotImplementedError: dropout_p: expected 0 for a sequence split over ranks, got 0.5", layer, x)
    layer.eval()
    layer.batch_invariant = True
    refuses("NotImplementedError: batch_invariant: not supported for a sequence split over ranks", layer, x)
    layer.batch_invariant = None
    given: dict[str, Any] = {"context": x, "key_lengths": torch.tensor([8]), "mask": torch.ones(8, 8).bool()}
    given |= {"bias": torch.zeros(8, 8), "relative_bias": torch.zeros(1, 1, 1, 3)}
    for name, value in {**given, "cache": KeyValueCache(1, HEADS, 8, 4)}.items():
        refuses(f"ValueError: ~ {name}: expected None with ContextParallel", layer, x, **{name: value})
    for call in (lambda: layer(x[:, :7]), lambda: gate(x[:, :7])):
        refuses("ValueError: x: expected an even number of tokens of this rank for layout 'zigzag'", call)
    message = "ValueError: ContextParallel: expected a module with a ScaledAttention, ~ got Linear"
    refuses(message, parallelize_module, nn.Linear(1, 1), mesh, ContextParallel())
    refuses("ValueError: layout: expected one of", parallelize_module, plain, mesh, ContextParallel(layout="striped"))
    with context_parallel(mesh, buffers=[torch.randn(1, 8, 1)], buffer_seq_dims=[1]):
        calls = {"ForgetGate": lambda: ForgetGate(WIDTH, HEADS)(x), "ALiBi": lambda: alibi(8)}
        shape, lengths = (1, 1, 8, 1), torch.tensor([0, 8]).int()
        calls |= {"key_counts": lambda: tritonattn.key_counts(shape, shape, causal=True)}
        calls |= {"key_counts_varlen": lambda: tritonattn.key_counts_varlen(lengths)}
        calls |= {"key_counts_decode": lambda: tritonattn.key_counts_decode(shape, key_lengths=lengths[1:])}
        for name, call in calls.items():
            refuses(f"NotImplementedError: {name}: torch's context_parallel is active", call)
