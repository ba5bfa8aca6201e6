"""A sequence shared by ranks: results, gradients and statistics are those of one process."""

import pytest
import torch

from tests.support.pairs import all_pairs, in_turn
from tritonattn import Scales, Scaling
from tritonattn.nn import PerHead, SSMax

from . import cases

METHODS = ("allgather", "alltoall", "ring")
LAYOUTS = ("contiguous", "zigzag")
MODES = ("sqrt_dim", "log_key_count", "key_norm_mean", "key_norm_max", "key_norm_rms", "cosine")
PLACES = all_pairs({"size": (2, 4), "method": METHODS, "layout": LAYOUTS, "mask": tuple(cases.MASKS), "scaling": MODES})


class HalfOfLargest(Scaling):
    """A user's own mode, which reads keys itself: 1 / (2 max_j |k_j1|), over all keys, and a bias of k_j2."""

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


def check(pool, allowed, *place, **options):
    for errors in pool.run(cases.errors, *place, options):
        assert max(errors.values()) <= allowed, errors


@pytest.mark.parametrize("place", PLACES, ids=lambda place: "-".join(map(str, place.values())))
def test_results_and_gradients(place, pool):
    check(pool, 1e-12, *place.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "scaling", [SSMax(heads=cases.HEADS), PerHead("key_norm_mean", heads=cases.HEADS), HalfOfLargest()], ids=str
)
def test_scalings_with_parameters_and_of_a_user(method, scaling, pool):
    if isinstance(scaling, torch.nn.Module):
        scaling = scaling.double()
    mask = "full" if isinstance(scaling, HalfOfLargest) else "causal"
    check(pool, 1e-12, 4, method, "zigzag", mask, scaling, softcap=3.0)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 2e-6), (torch.bfloat16, 1.6e-2)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_other_dtypes_and_few_heads_at_a_time(method, dtype, allowed, pool):
    check(pool, allowed, 4, method, "zigzag", "causal", "key_norm_mean", dtype=dtype, head_group=1)


@pytest.mark.parametrize("method", METHODS)
def test_statistics_of_rows_and_repeated_bits(method, pool):
    for aux, is_same in pool.run(cases.aux_and_repetition, method):
        assert max(aux.values()) <= 4e-6, aux
        assert is_same


@pytest.mark.parametrize("method", ["allgather", "alltoall"])
def test_one_graph_of_a_compiler(method, pool):
    if method == "allgather" and torch.__version__.startswith("2.8."):
        pytest.skip("torch 2.8 cannot trace the backward")
    for errors in pool.run(cases.compiled, method, seconds=120):
        assert max(errors) <= 1e-6


def test_shard_and_unshard_are_inverse_and_say_what_cannot_be_divided(pool):
    for message in pool.run(cases.round_trip):
        assert message == (
            "x: expected a number of tokens that 8 divides ('zigzag' over 4 ranks), got 12; pad the sequence, or end it"
            " with a document of padding"
        )


def test_every_rank_refuses(pool):
    for messages in pool.run(cases.refused):
        falls, passes, no_tensor, few_axes = messages
        assert falls == "cu_seqlens: expected offsets that do not fall, got 3 after 9"
        assert passes.startswith("cu_seqlens: expected offsets of at most S = ")
        assert no_tensor == "q: expected a tensor [B, Hq, Sq, D], got NoneType"
        assert few_axes.startswith("k_cache: expected 4 axes [B, Hkv, capacity, D], got 3")


@in_turn(
    scaling=["sqrt_dim", "key_count", "key_norm_mean", "key_norm_rms", "key_norm_max", "cosine"],
    q_len=[1, 3],
    window=[None, (10, None), None],
    has_statistics=[False, False, False, True, True],
    dtype=[torch.float32, torch.float64, torch.bfloat16, torch.float32],
)
def test_decode_of_a_shared_cache(scaling, q_len, window, has_statistics, dtype, pool):
    allowed = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 3e-2}[dtype]
    for error in pool.run(cases.decode, scaling, q_len, window, has_statistics, dtype):
        assert error <= allowed


@pytest.mark.parametrize(("fault", "method"), [("dies", "ring"), ("other shape", "allgather")])
def test_a_rank_that_fails_is_an_error_on_all(fault, method, pool):
    with pytest.raises(AssertionError) as failure:
        pool.run(cases.with_a_fault, fault, method, seconds=20)
    assert all(f"rank {rank}:" in str(failure.value) for rank in range(pool.size)), failure.value
    assert "no answer" not in str(failure.value), failure.value
