"""DTensors as arguments: batch and heads sharded, against one process."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import tritonattn
from tests.distributed.pool import on_every_rank
from tests.support.caches import cached_call
from tests.support.calls import CALLS, changed, example, torch_kernels
from tests.support.refusals import refuses
from tritonattn import nn
from tritonattn.core.norms import key_norms_of
from tritonattn.core.terms import AXES
from tritonattn.core.torch_distributed import whole
from tritonattn.distributed import HeadParallel
from tritonattn.ops import statistics as by_kernels
from tritonattn.ops.operators import flat

B, HQ, HKV, S, D = 4, 8, 4, 12, 8
PLACEMENTS = {
    "batch, heads": ((2, 2), (Shard(0), Shard(1))),
    "replicas, heads": ((2, 2), (Replicate(), Shard(1))),
    "heads": ((4,), (Shard(1),)),
    "batch": ((4,), (Shard(0),)),
    "heads twice": ((2, 2), (Shard(1), Shard(1))),
}


def _mesh(shape: tuple[int, ...]):
    return init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[-len(shape) :])


def _error(got: Any, want: Tensor) -> float:
    return ((whole(got) - want).abs().max() / want.abs().max()).item()


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("placed", "scaling"),
    [
        ("batch, heads", "key_norm_mean"),
        ("replicas, heads", "ssmax"),
        ("heads", "cosine"),
        ("batch", "per_head"),
        ("heads twice", "power_law"),
    ],
)
@on_every_rank
def test_results_and_gradients_are_those_of_one_process(rank: int, placed: str, scaling: Any) -> None:
    """Largest relative error of `attention` and its gradients, with every argument that has heads or a batch."""
    shape, placements = PLACEMENTS[placed]
    mesh = _mesh(shape)
    torch.manual_seed(0)
    named = {"q": _random(B, HQ, S, D), "k": _random(B, HKV, S, D), "v": _random(B, HKV, S, D + 4)}
    named |= {"gain": torch.rand(HQ, 1, dtype=torch.float64) + 0.5, "sinks": _random(HQ)}
    named |= {} if scaling in nn.LEARNED else {"sinks": _random(B, HQ, S)}
    named |= {"bias": _random(1, HQ, 1, S), "relative_bias": _random(B, 1, S, 4)}
    fixed: dict[str, Any] = {"causal": True, "softcap": 20.0, "relative_right": 1, "return_aux": True}
    fixed |= {"key_lengths": torch.tensor([S, 3, 5, 7]), "mask": torch.rand(1, HQ, S, S) > 0.2}
    module = nn.LEARNED[scaling](heads=HQ).double() if scaling in nn.LEARNED else scaling
    parameters = [p for p in module.parameters() if p.requires_grad] if scaling in nn.LEARNED else []

    def results(leaves: dict[str, Tensor]) -> tuple[Tensor, Any, list[Tensor]]:
        out, aux = tritonattn.attention(**leaves, **fixed, scaling=module)
        loss = out.square().sum() + aux.lse.sum()
        return out, aux, list(torch.autograd.grad(loss, [*leaves.values(), *parameters]))

    out, aux, gradients = results({name: x.clone().requires_grad_() for name, x in named.items()})
    spread = {
        name: distribute_tensor(x, mesh, placements).requires_grad_() for name, x in named.items() if name in "qkv"
    }
    alike = [name for name in named if name not in spread]  # on all ranks
    spread |= {name: named[name].clone().requires_grad_() for name in alike}
    got, got_aux, of_ranks = results(spread)
    assert got.placements == placements
    pairs = [(got, out), (got_aux.entropy, aux.entropy), *zip(of_ranks, gradients, strict=True)]
    assert max(_error(*pair) for pair in pairs) < 1e-12


def others(rank: int) -> dict[str, float]:
    """Largest relative error of `scaled_attention`, `attention_varlen` and `attention_decode`."""
    mesh = _mesh((2, 2))
    torch.manual_seed(0)
    errors = {}

    def compared(name: str, function, operands: dict[str, Tensor], placements, **rest: Any) -> None:
        spread = {key: distribute_tensor(x, mesh, placements[key]) for key, x in operands.items()}
        errors[name] = _error(function(**spread, **rest), function(**operands, **rest))

    operands = {"q": _random(B, HQ, S, D), "k": _random(B, HKV, S, D), "v": _random(B, HKV, S, D)}
    both = dict.fromkeys(operands, (Shard(0), Shard(1)))
    vectors = {
        "query_scale": torch.rand(HQ, 1, dtype=torch.float64),
        "key_scale": torch.rand(B, 1, S, dtype=torch.float64),
        "key_bias": nn.counted_from_rows(torch.rand(B, HKV, S, dtype=torch.float64)),
        "sinks": _random(HQ),
    }
    compared("scaled", tritonattn.scaled_attention, operands, both, **vectors, causal=True)

    packed = {name: x[0].transpose(0, 1).contiguous() for name, x in operands.items()}
    ends = torch.tensor([0, 5, S], dtype=torch.int32)
    heads = dict.fromkeys(packed, (Replicate(), Shard(1)))
    given: dict[str, Any] = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": 7, "max_seqlen_k": 7}
    given |= {"scaling": "key_norm_mean", "relative_bias": _random(HQ, 1, 3)}
    given |= {"sinks": _random(HQ, S), "gain": torch.rand(HQ, 1)}
    compared("varlen", tritonattn.attention_varlen, packed, heads, **given)

    cache = {"q": operands["q"][:, :, :2], "k_cache": operands["k"], "v_cache": operands["v"]}
    both = dict.fromkeys(cache, (Shard(0), Shard(1)))
    lengths = torch.tensor([S, 3, 5, 7])
    compared("decode", tritonattn.attention_decode, cache, both, key_lengths=lengths, scaling="key_norm_max")
    pages = {name: x.repeat(1, 1, 2, 1).transpose(1, 2).contiguous() for name, x in cache.items() if name != "q"}
    table = torch.arange(B, dtype=torch.int32)[:, None]
    paged = {"q": cache["q"], **pages}
    placed = {"q": (Shard(0), Shard(1)), **dict.fromkeys(pages, (Replicate(), Shard(2)))}
    rows = {"key_lengths": lengths, "query_lengths": torch.tensor([2, 1, 0, 2]), "relative_bias": _random(B, HQ, 1, 3)}
    compared("paged", tritonattn.attention_decode, paged, placed, **rows, block_table=table)
    ragged = {"q": packed["q"], "k": pages["k_cache"], "v": pages["v_cache"]}
    placed = {"q": (Replicate(), Shard(1)), **dict.fromkeys("kv", (Replicate(), Shard(2)))}
    given["cu_seqlens_q"] = torch.tensor([0, 2, 5, 6, S], dtype=torch.int32)
    given["cu_seqlens_k"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    compared("ragged", tritonattn.attention_varlen, ragged, placed, **given | {"max_seqlen_k": S}, block_table=table)
    return errors


def operators(rank: int) -> dict[str, float]:
    """Largest relative error of every operator on DTensors, and of its gradients; results are as sharded as q."""
    mesh, errors = _mesh((2, 2)), {}
    alike, both, heads = (Replicate(), Replicate()), (Shard(0), Shard(1)), (Replicate(), Shard(1))

    def results(operator: Any, arguments: list[Any]) -> tuple[list[Any], list[Any]]:
        found = operator(*arguments)
        found = [x for x in (found if isinstance(found, tuple) else (found,)) if x.numel()]
        if found[0].requires_grad:
            (found[0].square().sum() + found[-1 if len(found) == 1 else 1].clamp(min=-50).sin().sum()).backward()
        return found, [x.grad for x in arguments if isinstance(x, Tensor) and x.requires_grad]

    def compared(name: str, arguments: Any, placements: list[Any], wanted: Any = both, case: str = "") -> None:
        spread, one = list(arguments), list(arguments)
        for i, x in enumerate(arguments):
            if isinstance(x, Tensor):
                one[i] = x.detach().clone().requires_grad_(x.requires_grad)
                spread[i] = distribute_tensor(x.detach(), mesh, placements[i] if i < len(placements) else alike)
                spread[i].requires_grad_(x.requires_grad)
        operator = getattr(torch.ops.tritonattn, name)
        (found, gradients), (expected, theirs) = results(operator, spread), results(operator, one)
        assert wanted is None or {x.placements for x in found} == {wanted}
        pairs = [(whole(got).clamp(min=-50), want.clamp(min=-50)) for got, want in zip(found, expected, strict=True)]
        pairs += [(got, want) for got, want in zip(gradients, theirs, strict=True) if want.any()]
        errors[f"{name} {case}"] = max(_error(*pair) for pair in pairs)

    def arguments(case: str, aux: bool = False) -> list[Any]:
        return [*flat(changed(example(**CALLS[case]), aux=aux)), False]

    for case, options in CALLS.items():
        placements = heads if "sequences" in options else both
        wanted = alike if "dropout" in options else placements
        compared("forward", arguments(case), [placements] * 3, wanted, case)
    for case in ("softcap", "biases after softcap", "packed sinks dropout"):
        given = [x.detach() if isinstance(x, Tensor) else x for x in flat(example(**CALLS[case]))]
        out, lse, *_ = torch.ops.tritonattn.forward(*given, False)
        tangents = [None if x is None else torch.ones_like(x) for x in given[: len(AXES)]]
        along, needs = [*given, out, lse, None, *tangents], [x is not None for x in tangents]
        compared("tangent", along, [heads] * 3, None, case)
        compared("second", [*along, out.cos(), lse.cos(), [*needs, *needs]], [heads] * 3, None, case)
    compared("forward", arguments("plain", aux=True), [both] * 3, both, "aux, with placements as before")
    compared("forward", arguments("bias"), [(Shard(2), Shard(1))] * 3, None, "redistributed")
    q, k, v = (_random(2, n, 16, D) for n in (4, 2, 2))
    lengths, table, rows = torch.tensor([16, 5]), torch.tensor([[1], [0]], dtype=torch.int32), torch.tensor([2, 1])
    pages = [x.transpose(1, 2).contiguous() for x in (k, v)]
    for cache, placed in (((k, v, lengths), both), ((*pages, lengths, table, rows), (Replicate(), Shard(1)))):
        call = cached_call(q[:, :, :2], *cache, sinks=_random(2, 4, 2), aux=True)
        compared("forward", [*flat(call), False], [both, placed, placed], case=str(placed))
    seen, of_keys = torch.arange(16)[None, None] < lengths[:, None, None], key_norms_of(k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_kernels, "kernels", torch_kernels)
        compared("key_norms", [k.requires_grad_(), seen], [both])
        shared = torch.arange(16)[None, None] % 5 == 0
        for case, restarts in {"": None, "restarts of all heads": shared, "restarts of each": of_keys > 2}.items():
            compared("prefix_sums", [of_keys, restarts], [both], case=case)
        compared("argmax_over_ranges", [of_keys, torch.tensor([[[0, 3]]]), torch.tensor([[[9, 16]]])], [both])
    odd = (_random(2, n, 5, D).requires_grad_() for n in (6, 3, 3))
    compared("forward", [*odd, *arguments("plain")[3:]], [both] * 3, (Shard(0), Replicate()), "3 key heads")
    return errors


@on_every_rank
def test_placements_are_refused_by_the_arguments_name(rank: int) -> None:
    """Placements that attention cannot take are refused by the argument's name."""
    mesh, plain = _mesh((4,)), torch.randn(B, HQ, S, D)

    def placed(placement: Any, x: Tensor = plain) -> DTensor:
        return distribute_tensor(x, mesh, [placement])

    sharded, replica, few = placed(Shard(1)), placed(Replicate()), placed(Shard(1), torch.randn(B, 2, S, D))
    for q, k, v, others, message in (
        (placed(Shard(2)), sharded, sharded, {}, r"q: expected its batch or heads sharded, or replicas, got \(S.*2"),
        (placed(Shard(3)), sharded, sharded, {}, r"q: expected its batch or heads sharded, or replicas, got \(S.*3"),
        (sharded, replica, sharded, {}, r"k: expected q's mesh, and \(S.*1.*\) there, got \(R"),
        (sharded, sharded, plain, {}, "v: expected a DTensor, as q is, got a Tensor"),
        (plain, sharded, sharded, {}, "k: expected a plain tensor with a plain q, got a DTensor"),
        (sharded, few, few, {}, "k: axis 1: expected a size that 4 ranks divide, got 2"),
        (
            plain,
            plain,
            plain,
            {"sinks": torch.randn(HQ)},
            "sinks: expected a value for each of q's 8 heads .* got 2 of 8",
        ),
        (plain, plain, plain, {"key_lengths": torch.ones(B).long()}, "key_lengths: expected a plain tensor with a"),
    ):
        options = {name: placed(Shard(0), x) for name, x in others.items()}
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            tritonattn.attention(q, k, v, **options)


@on_every_rank
def test_dropout_differs_by_shard_and_agrees_between_replicas(rank: int) -> None:
    """Dropout under one seed, of heads whose operands are alike: replicas agree, shards differ."""
    mesh = _mesh((2, 2))
    one = torch.randn(1, 1, S, D, generator=torch.Generator().manual_seed(0)).expand(2, 4, S, D).contiguous()
    torch.manual_seed(0)
    q = distribute_tensor(one, mesh, [Replicate(), Shard(1)])
    out = tritonattn.attention(q, q, q, dropout_p=0.5)
    replicas = DTensor.from_local(out.to_local(), mesh, [Shard(0), Shard(1)], run_check=False).full_tensor()
    assert torch.equal(replicas[:2], replicas[2:])
    q = distribute_tensor(one, mesh, [Shard(0), Shard(1)])
    outputs = list(tritonattn.attention(q, q, q, dropout_p=0.5).full_tensor().flatten(0, 1))
    assert not any(torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


def test_explicit_scales_packed_sequences_and_caches(pool):
    assert max(max(errors.values()) for errors in pool.run(others)) < 1e-12


def test_operators_have_sharding_rules(pool):
    for errors in pool.run(operators):
        assert max(errors.values()) < 1e-12, errors


def test_parameters_that_are_no_values_of_heads_are_refused_by_name():
    scaling, mesh = nn.SSMax(4), SimpleNamespace(size=lambda: 3)
    apply = HeadParallel("s", "t")._apply
    refuses("ValueError: HeadParallel: expected names of SSMax's parameters, got t", apply, scaling, mesh)
    message = "ValueError: s: expected one value per head on the first axis, ~ 3 ranks divide, got [4]"
    refuses(message, HeadParallel()._apply, scaling, mesh)
