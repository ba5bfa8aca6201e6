"""A sequence shared by ranks: results, gradients and statistics are those of one process."""

from copy import deepcopy
from itertools import pairwise as neighbours
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import tritonattn
from tests.calls.test_distances import Near
from tests.distributed.pool import on_every_rank
from tests.support.pairs import in_turn, pairwise
from tests.support.refusals import refuses
from tritonattn import Scales, Scaling, nn
from tritonattn.distributed import context_parallel_attention, context_parallel_decode, shard, unshard
from tritonattn.nn import PerHead, SSMax

METHODS, LAYOUTS = ("allgather", "alltoall", "ring"), ("contiguous", "zigzag")
MODES = ("sqrt_dim", "log_key_count", "key_norm_mean", "key_norm_max", "key_norm_rms", "cosine")
LENGTH, HEADS, KV_HEADS, DIM = 48, 4, 2, 8
OFFSETS = (0, 5, 20, 21, 48)
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (13, None)},  # rows attend to the last key alone of a chunk of 6, and of 12
    "two-sided": {"window": (9, 5)},
    "documents": {"causal": True, "cu_seqlens": OFFSETS},
    "full documents": {"cu_seqlens": OFFSETS},
}


def mesh_of(size: int) -> DeviceMesh:
    """The mesh of `size` ranks that this one belongs to."""
    return init_device_mesh("cpu", (dist.get_world_size() // size, size), mesh_dim_names=("other", "cp"))["cp"]


def in_one_process(mask: dict[str, Any], batch: int) -> dict[str, Any]:
    """The arguments of `attention` for a mask of `MASKS`."""
    mask = dict(mask)
    offsets = mask.pop("cu_seqlens", None)
    if offsets is not None:
        pairs = [(a, b) for a, b in neighbours(offsets) for _ in range(b - a)]
        mask["key_ranges"] = torch.tensor(pairs).expand(batch, -1, -1)
    return mask


def operands(dtype: torch.dtype, length: int = LENGTH) -> list[torch.Tensor]:
    """q, k, v and the output's gradient of the whole sequence, the same on every rank."""
    torch.manual_seed(0)
    shapes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM + 4), (HEADS, DIM + 4))
    return [torch.randn(2, heads, length, dim, dtype=torch.float64).to(dtype) for heads, dim in shapes]


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def errors(
    rank: int, size: int, method: str, layout: str, mask: str, scaling: Any, options: dict[str, Any]
) -> dict[str, float]:
    """Errors of output and gradients, each relative to the largest value, on this rank; one process is fp64."""
    mesh, dtype = mesh_of(size), options.get("dtype", torch.float64)
    options = {name: value for name, value in options.items() if name != "dtype"}
    *whole, d_out = operands(dtype)
    has_sinks_of_rows, of_rows = layout == "zigzag", {"mesh": mesh, "layout": layout}
    sinks_shape = (2, HEADS, LENGTH) if has_sinks_of_rows else (HEADS,)
    rows = torch.rand(HEADS, 1, dtype=torch.float64) + 0.5, torch.randn(sinks_shape, dtype=torch.float64)
    bias = torch.randn(1, KV_HEADS, LENGTH, dtype=torch.float64)
    marked = nn.counted_from_rows if "softcap" not in options else torch.clone
    mode, learned = deepcopy(scaling), deepcopy(scaling)
    *one, gain, sinks, one_bias = leaves(*(x.double() for x in whole), *rows, bias)
    learnable = {"scaling": mode, "gain": gain, "sinks": sinks, "key_bias": marked(one_bias)}
    of_one = {name: value for name, value in options.items() if name != "head_group"}
    out = tritonattn.attention(*one, **learnable, **in_one_process(MASKS[mask], 2), **of_one)
    out.backward(d_out.double())
    given = dict(MASKS[mask])
    if "cu_seqlens" in given:
        given["cu_seqlens"] = torch.tensor(given["cu_seqlens"], dtype=torch.int32)
    wide = torch.promote_types(dtype, torch.float32)
    *parts, local_gain, local_sinks, local_bias = leaves(
        *(shard(x, **of_rows) for x in whole),
        rows[0].to(wide),
        shard(rows[1].to(wide), **of_rows) if has_sinks_of_rows else rows[1].to(wide),
        shard(bias.to(wide), **of_rows, dim=2),
    )
    given |= {"scaling": learned, "gain": local_gain, "sinks": local_sinks, "key_bias": marked(local_bias), **options}
    got = context_parallel_attention(*parts, mesh=mesh, method=method, layout=layout, **given)
    got.backward(shard(d_out, mesh=mesh, layout=layout))
    pairs = {"out": (got, shard(out, mesh=mesh, layout=layout))}
    for name, mine, all_of_it in zip("qkv", parts, one, strict=True):
        pairs[name] = mine.grad, shard(all_of_it.grad, mesh=mesh, layout=layout)
    pairs["key_bias"] = local_bias.grad, shard(one_bias.grad, mesh=mesh, layout=layout, dim=2)
    parameters = [("gain", local_gain, gain)]
    if has_sinks_of_rows:
        pairs["sinks"] = local_sinks.grad, shard(sinks.grad, **of_rows)
    else:
        parameters.append(("sinks", local_sinks, sinks))
    if isinstance(mode, torch.nn.Module):
        parameters += [
            (name, mine, one) for (name, mine), one in zip(learned.named_parameters(), mode.parameters(), strict=True)
        ]
    for name, mine, all_of_it in parameters:
        dist.all_reduce(mine.grad, group=mesh.get_group())
        pairs[name] = mine.grad, all_of_it.grad
    return {name: ((a.double() - b).abs().max() / b.abs().max()).item() for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("method", METHODS)
@on_every_rank
def test_rows_do_not_depend_on_keys_behind_them(rank: int, size: int, method: str) -> None:
    """A NaN, infinite or very long key does not reach the rows before it, nor a large gradient the keys after it.

    A batch entry for every value and every position.
    """
    mesh, length = DeviceMesh("cpu", list(range(size))), 12
    if rank >= size:
        return
    position = torch.arange(length).repeat(4)
    torch.manual_seed(0)
    *whole, d_out = (torch.randn(len(position), heads, length, 4, dtype=torch.float64) for heads in (6, 2, 2, 6))
    values = torch.tensor([torch.nan, torch.inf, 1e15, 1e15], dtype=torch.float64).repeat_interleave(length)
    for x, entries in ((whole[1], slice(0, 3 * length)), (d_out, slice(3 * length, None))):
        x[torch.arange(len(position))[entries], :, position[entries]] = values[entries, None, None]
    before, after = (compare(torch.arange(length), position[:, None]) for compare in (torch.lt, torch.gt))
    for scaling in ("key_norm_sum", "key_norm_mean", "key_norm_rms", "key_norm_l2"):
        one = leaves(*whole)
        out = tritonattn.attention(*one, scaling=scaling, causal=True)
        out.backward(d_out)
        wanted = [out.detach(), *(x.grad for x in one)]
        assert out.mT.isfinite()[before[:, None, None].expand_as(out.mT)].all()
        for layout in LAYOUTS:
            parts = leaves(*(shard(x, mesh=mesh, layout=layout) for x in whole))
            got = context_parallel_attention(
                *parts, mesh=mesh, method=method, layout=layout, scaling=scaling, causal=True
            )
            got.backward(shard(d_out, mesh=mesh, layout=layout))
            for mine, x, there in zip([got, *(x.grad for x in parts)], wanted, 2 * [before] + 2 * [after], strict=True):
                x, there = shard(x, mesh=mesh, layout=layout), shard(there, mesh=mesh, layout=layout, dim=1)
                there = there[:, None, :, None] & x.isfinite()
                torch.testing.assert_close(mine[there], x[there], rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@on_every_rank
def test_statistics_of_rows_and_repeated_bits(rank: int, method: str) -> None:
    """`AttentionAux` in fp32 is that of one process, and a second call gives the same bits, gradients included."""
    mesh = mesh_of(dist.get_world_size())
    *whole, d_out = operands(torch.float32)
    options = {"scaling": "key_norm_sum", "gain": 9.0, "causal": True, "softcap": 2.0, "return_aux": True}

    def loss(out, aux, d_out):
        return (out * d_out + (aux.lse + 3 * aux.max_logit.cos() + 3 * aux.entropy.sin())[..., None]).sum()

    one = leaves(*(x.double() for x in whole))
    expected, wanted = tritonattn.attention(*one, **options)
    loss(expected, wanted, d_out.double()).backward()
    bits = []
    for _ in range(2):
        parts = leaves(*(shard(x, mesh=mesh, layout="zigzag") for x in whole))
        out, aux = context_parallel_attention(*parts, mesh=mesh, method=method, layout="zigzag", **options)
        loss(out, aux, shard(d_out, mesh=mesh, layout="zigzag")).backward()
        bits.append([out, *aux, *(x.grad for x in parts)])
    for mine, x in zip(aux, wanted, strict=True):
        torch.testing.assert_close(mine.double(), shard(x, mesh=mesh, layout="zigzag"), rtol=0, atol=4e-6)
    for mine, x in zip(parts, one, strict=True):
        exact, size = shard(x.grad, mesh=mesh, layout="zigzag"), x.grad.abs().max().item()
        torch.testing.assert_close(mine.grad.double(), exact, rtol=0, atol=1e-5 * size)
    assert all(torch.equal(a, b) for a, b in zip(*bits, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
@on_every_rank
def test_the_lowest_key_of_all_ranks_takes_the_gradient_of_the_largest_logit(
    rank: int, method: str, layout: str
) -> None:
    mesh = mesh_of(dist.get_world_size())
    whole = [torch.ones_like(x) for x in operands(torch.float64)[:3]]
    parts = leaves(*(shard(x, mesh=mesh, layout=layout) for x in whole))
    _, aux = context_parallel_attention(*parts, mesh=mesh, method=method, layout=layout, return_aux=True)
    aux.max_logit.sum().backward()
    d_k = unshard(parts[1].grad, mesh=mesh, layout=layout)
    rows = LENGTH * HEADS // KV_HEADS
    torch.testing.assert_close(d_k[:, :, 0], torch.full_like(d_k[:, :, 0], rows * DIM**-0.5))
    assert not d_k[:, :, 1:].any()


@pytest.mark.parametrize("method", METHODS)
@on_every_rank
def test_gradients_of_keys_in_16_bits(rank: int, method: str) -> None:
    """They are the same where q has none, and less exact where ranks add them in 16 bits."""
    mesh, (*whole, d_out) = mesh_of(dist.get_world_size()), operands(torch.bfloat16)
    options = {"scaling": "key_norm_mean", "causal": True}
    one = leaves(*(x.double() for x in whole))
    tritonattn.attention(*one, **options).backward(d_out.double())

    def gradient(q_learns: bool, reduce_dtype: torch.dtype) -> torch.Tensor:
        q, k, v = leaves(*(shard(x, mesh=mesh) for x in whole))
        out = context_parallel_attention(
            q.requires_grad_(q_learns), k, v, mesh=mesh, method=method, reduce_dtype=reduce_dtype, **options
        )
        out.backward(shard(d_out, mesh=mesh))
        return unshard(k.grad, mesh=mesh)

    exact = gradient(True, torch.float32)
    assert torch.equal(exact, gradient(False, torch.float32))
    errors = [(x - one[1].grad).norm() for x in (exact, gradient(True, torch.bfloat16))]
    assert 1.2 * errors[0] < errors[1]


@on_every_rank
def test_of_equal_norms_the_first_key_takes_the_gradient(rank: int) -> None:
    """Of one process and of ranks, whose chunks all hold keys of one norm."""
    mesh, (*whole, d_out) = mesh_of(dist.get_world_size()), operands(torch.float64)
    whole[1] = whole[1].sign()
    for causal in (False, True):
        one = leaves(*whole)
        tritonattn.attention(*one, scaling="key_norm_max", causal=causal).backward(d_out)
        for layout in LAYOUTS:
            parts = leaves(*(shard(x, mesh=mesh, layout=layout) for x in whole))
            out = context_parallel_attention(*parts, mesh=mesh, layout=layout, scaling="key_norm_max", causal=causal)
            out.backward(shard(d_out, mesh=mesh, layout=layout))
            torch.testing.assert_close(parts[1].grad, shard(one[1].grad, mesh=mesh, layout=layout), rtol=0, atol=1e-12)


@on_every_rank
def test_shard_and_unshard_are_inverse_and_say_what_cannot_be_divided(rank: int) -> None:
    mesh, x = mesh_of(dist.get_world_size()), torch.arange(48.0).view(2, 1, 24)
    for layout in LAYOUTS:
        part = shard(x, mesh=mesh, layout=layout).requires_grad_()
        whole = unshard(part, mesh=mesh, layout=layout)
        assert torch.equal(whole, x)
        (whole * x).sum().backward()
        assert torch.equal(part.grad, 4 * part)  # from four ranks
    message = (
        "ValueError: x: expected a number of tokens that 8 divides ('zigzag' over 4 ranks), got 12; pad the sequence"
        " (tritonattn.distributed.pad), or end it with a document of padding"
    )
    refuses(message, shard, x[..., :12], mesh=mesh, layout="zigzag")


@on_every_rank
def test_every_rank_refuses(rank: int) -> None:
    """Every rank refuses before it sends anything."""
    mesh = mesh_of(dist.get_world_size())
    q, k, v = (shard(x, mesh=mesh) for x in operands(torch.float32)[:3])

    def decoded(q, k, **options):
        return context_parallel_decode(q, k, v, mesh=mesh, key_lengths=torch.tensor([1, 1]), **options)

    for offsets, message in (([0, 9, 3], "that do not fall, got 3 after 9"), ([0, 999], "of at most S = 48, got 999")):
        given = {"mesh": mesh, "cu_seqlens": torch.tensor(offsets).int()}
        refuses(f"ValueError: cu_seqlens: expected offsets {message}", context_parallel_attention, q, k, v, **given)
    message = "TypeError: reduce_dtype: expected one of torch.float16 ~ got None"
    refuses(message, context_parallel_attention, q, k, v, mesh=mesh, reduce_dtype=None)
    sharded = distribute_tensor(q, mesh, [Shard(1)])
    message = (
        r": expected a plain tensor, got a DTensor placed \(S(hard)?\((dim=)?1\)\) on a mesh of \(4,\);"
        r" \w+.to_local\(\) is this rank's part, \w+.full_tensor\(\) the whole"
    )
    for name, call in {
        "k": lambda: context_parallel_attention(q, sharded, v, mesh=mesh),
        "k_cache": lambda: decoded(q, sharded),
        "x": lambda: shard(sharded, mesh=mesh),
    }.items():
        with pytest.raises(TypeError, match=name + message):
            call()
    message = "TypeError: ~ got ProcessGroup; DeviceMesh.from_group(group, device_type) makes one"
    refuses(message, shard, q, mesh=mesh.get_group())
    for call in (
        lambda: context_parallel_attention(q, k, v, mesh=mesh, scaling=Near()),
        lambda: decoded(q[:, :, :1], k, scaling=Near()),
    ):
        message = "scaling: expected one without a factor or bias of distances over ranks, got Near"
        refuses(f"NotImplementedError: {message}", call)
    refuses("TypeError: q: expected a tensor [B, Hq, Sq, D], got NoneType", decoded, None, k)
    with forward_ad.dual_level():
        refuses("NotImplementedError: forward mode (jvp): ~ over ranks", context_parallel_attention, q, k, v, mesh=mesh)
    refuses("ValueError: k_cache: expected 4 axes [B, Hkv, capacity, D], got 3", decoded, q[:, :, :1], k[0])


@on_every_rank
def test_gradients_of_gradients_are_refused(rank: int) -> None:
    mesh = mesh_of(dist.get_world_size())
    tensors = leaves(*(shard(x, mesh=mesh) for x in operands(torch.float32)[:3]))
    key_bias = torch.zeros(1, KV_HEADS, tensors[1].shape[2], requires_grad=True)
    out = context_parallel_attention(*tensors, mesh=mesh, key_bias=key_bias)
    found = torch.autograd.grad(out.square().sum(), (*tensors, key_bias), create_graph=True)
    whole = unshard(tensors[0], mesh=mesh).square().sum()
    found += torch.autograd.grad(whole, tensors[0], create_graph=True)
    message = "NotImplementedError: ~ several ranks has no gradients of gradients; backends ~ 'reference' have them"
    for x in found:
        refuses(message, torch.autograd.grad, x.sum(), tensors)


def decode(rank: int, scaling: str, q_len: int, window: Any, has_statistics: bool, dtype: torch.dtype) -> float:
    """Largest error of outputs and statistics of rows: sequences of 0 to all keys, the rest of the cache NaN."""
    ranks, capacity = dist.get_world_size(), 8
    torch.manual_seed(0)
    lengths = torch.tensor([0, 3, 9, 22, ranks * capacity])
    q = torch.randn(5, HEADS, q_len, DIM, dtype=torch.float64).to(dtype)
    k, v = torch.randn(2, 5, KV_HEADS, ranks * capacity, DIM, dtype=torch.float64).to(dtype)
    hidden = torch.arange(ranks * capacity) >= lengths[:, None, None, None]
    k, v = (x.masked_fill(hidden.mT, torch.nan) for x in (k, v))
    options = {"scaling": scaling, "gain": 3.0, "window": window, "softcap": 4.0, "return_aux": True}
    options |= {"sinks": torch.linspace(-1, 2, HEADS * q_len).view(HEADS, -1), "key_lengths": lengths.to(torch.uint8)}
    wanted, expected = tritonattn.attention_decode(q.double(), k.double(), v.double(), **options)
    parts = slice(rank * capacity, (rank + 1) * capacity)
    k, v, statistics = k[:, :, parts], v[:, :, parts], None
    if has_statistics:
        statistics = tritonattn.KeyStatistics(5, KV_HEADS, capacity)
        statistics.append(k.nan_to_num(), counts=(lengths - parts.start).clamp(0, capacity))
    mesh = mesh_of(ranks)
    got, aux = context_parallel_decode(q, k, v, mesh=mesh, statistics=statistics, **options)
    worst = 0.0
    for x, y in zip((got, *aux), (wanted, *expected), strict=True):
        assert torch.equal(x == -torch.inf, y == -torch.inf)
        assert not x.isnan().any()
        worst = max(worst, (x.double() - y).nan_to_num(0, 0, 0).abs().max().item())
    return worst


class HalfOfLargest(Scaling):
    """A user's mode, which reads keys itself: 1 / (2 max_j |k_j1|), over all keys, and a bias of k_j2."""

    def scales(self, q, k, visibility, statistics):
        return Scales(
            0.5,
            query=k[..., 0].abs().amax(-1, keepdim=True).reciprocal().expand(-1, -1, q.shape[2]),
            key_bias=k[..., 1],
        )

    def multiplier(self, q, k, visible):
        return 0.5 / k[..., 0].abs().amax(-1)[..., None, None]

    def addend(self, q, k, visible):
        return k[:, :, None, :, 1]


def check(pool, allowed, *case, **options):
    for found in pool.run(errors, *case, options):
        assert max(found.values()) <= allowed, found


@pairwise(size=(2, 4), method=METHODS, layout=LAYOUTS, mask=MASKS, scaling=MODES)
def test_results_and_gradients(size, method, layout, mask, scaling, pool):
    check(pool, 1e-12, size, method, layout, mask, scaling)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("scaling", "mask"),
    [
        (SSMax(heads=HEADS).double(), "causal"),
        (PerHead("key_norm_mean", heads=HEADS).double(), "causal"),
        (HalfOfLargest(), "full"),
    ],
    ids=["ssmax", "per_head", "of a user"],
)
def test_scalings_with_parameters_and_of_a_user(method, scaling, mask, pool):
    check(pool, 1e-12, 4, method, "zigzag", mask, scaling, softcap=3.0)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 7e-6), (torch.bfloat16, 1.6e-2)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_other_dtypes_and_few_heads_at_a_time(method, dtype, allowed, pool):
    check(pool, allowed, 4, method, "zigzag", "causal", "key_norm_mean", dtype=dtype, head_group=1)


@in_turn(
    scaling=[*MODES, "key_norm_max", "key_norm_mean"],
    q_len=[1, 3],
    window=[None, (6, None), None],
    has_statistics=[False, False, False, True, True, False, False, True],
    dtype=[torch.float32, torch.float64, torch.bfloat16, torch.float32],
)
def test_decode_of_a_shared_cache(scaling, q_len, window, has_statistics, dtype, pool):
    allowed = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 3e-2}[dtype]
    for error in pool.run(decode, scaling, q_len, window, has_statistics, dtype):
        assert error <= allowed
