"""`key_counts`: n of every mask, packing and cache, by its definition, in a graph, and on a device that is not read."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.support.masks import MASKS, visible_pairs
from tests.support.packed import RAGGED, Packed, offsets
from tests.support.refusals import refuses
from tritonattn import attention, attention_varlen, key_counts, key_counts_decode, key_counts_varlen, nn
from tritonattn.core.visibility import Visibility

B, HQ, HKV, D = 2, 4, 2, 8
LENGTHS = [(9, 9), (5, 11), (11, 5), (1, 13), (0, 4), (4, 0)]
WINDOWS = [None, (2, 0), (0, 1), (None, 2), (3, -1)]


def shapes(q_len: int, k_len: int) -> tuple[torch.Size, torch.Size]:
    return torch.Size((B, HQ, q_len, D)), torch.Size((B, HKV, k_len, D))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name, lengths):
    arguments = MASKS[name](B, HQ, *lengths)
    if "key_ranges" in arguments:
        arguments["key_ranges"] = arguments["key_ranges"].sort(-1).values
    n = key_counts(*shapes(*lengths), **arguments)
    wanted = visible_pairs((B, HQ, *lengths), **arguments).sum(-1)
    assert n.dtype == torch.int64
    assert torch.equal(n.expand(wanted.shape), wanted)
    assert n.shape[1] == (HQ if "mask" in arguments and arguments["mask"].shape[1] > 1 else 1)
    of_tensors = key_counts(*(torch.empty(shape, dtype=torch.bfloat16) for shape in shapes(*lengths)), **arguments)
    assert torch.equal(of_tensors, n)


@pytest.mark.parametrize("packed", [RAGGED, Packed((7,), (7,)), Packed((), (), 3, 2)], ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(packed, window, causal):
    ends = [offsets(lengths) for lengths in (packed.q_lengths, packed.k_lengths)]
    sides = None if window is None else tuple(None if side == -1 else side for side in window)
    wanted = packed.visible(causal, sides).sum(-1, keepdim=True)
    assert torch.equal(key_counts_varlen(*ends, total_q=packed.q_len, causal=causal, window=window), wanted)
    rows = packed.q_len - packed.q_tail
    assert torch.equal(key_counts_varlen(*ends, causal=causal, window=window), wanted[:rows])


def test_packed_sequences_of_one_layout():
    ends = offsets((3, 0, 2))
    assert key_counts_varlen(ends, causal=True).T.tolist() == [[1, 2, 3, 1, 2]]
    assert torch.equal(key_counts_varlen(ends), key_counts_varlen(ends, ends))


@pytest.mark.parametrize("window", [None, (3, 0)])
def test_caches(window):
    """Rows of a cache have the counts that they have in one full pass."""
    length, rows = 12, 3
    whole = key_counts((B, HQ, length, D), (B, HKV, length, D), causal=True, window=window)
    for end in range(rows, length + 1):
        n = key_counts_decode((B, HQ, rows, D), key_lengths=torch.full((B,), end), window=window)
        assert torch.equal(n, whole[:, :, end - rows : end].expand(B, 1, rows))
    ragged = {"key_lengths": torch.tensor([7, 2]), "query_lengths": torch.tensor([1, 3])}
    n = key_counts_decode((B, HQ, rows, D), **ragged, window=window)
    assert n.tolist() == [[[4 if window else 7, 0, 0]], [[0, 1, 2]]]


@pytest.mark.parametrize("name", [name for name in MASKS if "ranges" not in name and name != "everything"])
def test_q_that_is_scaled_by_it_is_ssmax(name):
    """The modes have this n: q times s ln n, and PyTorch's attention, is SSMax."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, HQ, 9, D, dtype=torch.float64, generator=draw) for _ in range(3))
    scaling = nn.SSMax(HQ, base=9)
    arguments = MASKS[name](B, HQ, 9, 9)
    n = key_counts(q, k, **arguments).clamp(min=1)
    scaled = q * (n.double().log() / math.log(9))[..., None]
    theirs = F.scaled_dot_product_attention(scaled, k, v, visible_pairs((B, HQ, 9, 9), **arguments)).nan_to_num(0)
    torch.testing.assert_close(attention(q, k, v, scaling=scaling, **arguments), theirs, rtol=1e-6, atol=1e-6)


def test_packed_q_that_is_scaled_by_it_is_ssmax():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(9, HQ, D, dtype=torch.float64, generator=draw) for _ in range(3))
    ends = offsets((4, 5))
    call = (k, v, ends, ends, 5, 5)
    scaled = q * (key_counts_varlen(ends, causal=True).double().log() / math.log(9))[..., None]
    theirs = attention_varlen(scaled, *call, causal=True)
    ours = attention_varlen(q, *call, causal=True, scaling=nn.SSMax(HQ, base=9))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_there_is_one_code(monkeypatch):
    """What a call counts, these functions count: they have no formula of their own."""
    counted = Visibility.counts
    monkeypatch.setattr(Visibility, "counts", lambda visible: counted(visible) + 100)
    sizes = (B, HQ, 3, 5), (B, HQ, 6, 5)  # of no other test: counts of sizes are kept
    assert key_counts(*sizes, causal=True).tolist() == [[[104, 105, 106]]]
    assert key_counts_varlen(offsets((2, 1)), window=(17, 0)).T.tolist() == [[101, 102, 101]]
    assert key_counts_decode((1, 1, 1, 1), key_lengths=torch.tensor([7717])).tolist() == [[[7817]]]


def test_the_result_is_the_callers_own():
    n = key_counts(*shapes(5, 5), causal=True)
    key_counts(*shapes(5, 5), causal=True).zero_()
    assert n.tolist() == [[[1, 2, 3, 4, 5]]]


def test_sizes_cost_no_memory():
    """Of a trillion entries of q, and under autocast, which copies operands."""
    sizes = (1 << 20, 64, 4, 1 << 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert key_counts(sizes, sizes, causal=True).tolist() == [[[1, 2, 3, 4]]]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_one_graph():
    torch._dynamo.reset()

    def function(q, k, lengths, ends):
        n = key_counts(q, k, causal=True, key_lengths=lengths)
        of_sizes = key_counts(q.shape, k.shape, window=(2, 0))
        packed = key_counts_varlen(ends, total_q=q.shape[2], causal=True)
        return n, of_sizes, packed, key_counts_decode(q, key_lengths=lengths, window=(1, 0))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for length in (6, 8, 11):
        q, k = (torch.empty(shape) for shape in shapes(length, length))
        arguments = (q, k, torch.tensor([length, 3]), offsets((2, length - 2)))
        for ours, theirs in zip(compiled(*arguments), function(*arguments), strict=True):
            assert torch.equal(ours, theirs)


def test_values_of_a_device_are_not_read():
    """A tensor of the device meta has no values: reading one raises."""
    q, k = (torch.empty(shape, device="meta") for shape in shapes(6, 6))
    lengths, ends = torch.empty(B, device="meta").int(), torch.empty(B + 1, device="meta").int()
    ranges, mask = torch.empty(B, 6, 2, device="meta").int(), torch.empty(6, 6, device="meta").bool()
    found = {
        key_counts(q, k, causal=True): (1, 1, 6),
        key_counts(q.shape, k.shape, causal=True, key_lengths=lengths): (B, 1, 6),
        key_counts(q, k, key_ranges=ranges): (B, 1, 6),
        key_counts(q, k, mask=mask): (1, 1, 6),
        key_counts_varlen(ends, total_q=6, causal=True): (6, 1),
        key_counts_varlen(ends, ends, total_q=6, window=(2, 0)): (6, 1),
        key_counts_decode(q, key_lengths=lengths, query_lengths=lengths, window=(2, 0)): (B, 1, 6),
    }
    for n, shape in found.items():
        assert (n.device.type, n.dtype, n.shape) == ("meta", torch.int64, shape)
    refuses("ValueError: total_q: expected the number of rows, q.shape[0], got None", key_counts_varlen, ends)


def test_bad_arguments():
    q, k = shapes(6, 6)
    refuses("TypeError: q: expected a tensor [B, Hq, Sq, D] or its shape, got int 6", key_counts, 6, k)
    refuses("ValueError: q: expected shape [B, Hq, Sq, D], got [4, 6, 8]", key_counts, q[1:], k)
    refuses("ValueError: k: expected at least 0, got -1", key_counts, q, (*k[:3], -1))
    refuses("TypeError: k: expected an int, got float 6.0", key_counts, q, [B, HKV, 6.0, D])
    refuses("ValueError: k: expected [B, Hkv, Sk, D] with q's B = 2, got [1, 2, 6, 8]", key_counts, q, (1, *k[1:]))
    refuses("ValueError: k: expected a number of heads that divides q's 4, got 3", key_counts, q, (B, 3, 6, D))
    refuses(
        "ValueError: key_lengths: expected shape [B] = [2], got [1]", key_counts, q, k, key_lengths=torch.ones(1).int()
    )
    refuses(
        "ValueError: key_lengths: expected values in [0, Sk = 6], got 7",
        key_counts,
        q,
        k,
        key_lengths=torch.tensor([7, 1]),
    )
    refuses("TypeError: mask: expected dtype torch.bool", key_counts, q, k, mask=torch.ones(6, 6))
    meta = torch.ones(2, device="meta").int()
    refuses(
        "ValueError: key_lengths: expected q's device cpu, got meta", key_counts, torch.empty(q), k, key_lengths=meta
    )
    refuses("TypeError: key_counts: expected no v=: q and k are enough", key_counts, q, k, torch.empty(k))
    refuses("TypeError: key_counts: expected causal=", key_counts, q, k, is_causal=True)

    ends = offsets((2, 4))
    refuses("TypeError: cu_seqlens_q: expected dtype torch.int32, got torch.int64", key_counts_varlen, ends.long())
    refuses("ValueError: cu_seqlens_q: expected offsets that do not fall", key_counts_varlen, ends.flip(0) - 6)
    refuses("ValueError: cu_seqlens_q: expected a first offset of 0, got 1", key_counts_varlen, ends + 1)
    refuses("ValueError: cu_seqlens_k: expected shape [N + 1] = [3], got [2]", key_counts_varlen, ends, ends[:2])
    refuses("ValueError: cu_seqlens_q: expected offsets of at most T_q = 5, got 6", key_counts_varlen, ends, total_q=5)
    refuses("TypeError: total_q: expected an int, got float 6.0", key_counts_varlen, ends, total_q=6.0)
    refuses("TypeError: window: expected (left, right), got 3", key_counts_varlen, ends, window=3)

    lengths = torch.tensor([6, 6])
    refuses("ValueError: q: expected shape [B, Hq, Sq, D], got [6]", key_counts_decode, (6,), key_lengths=lengths)
    refuses("ValueError: key_lengths: expected shape [B] = [2], got [1]", key_counts_decode, q, key_lengths=lengths[:1])
    refuses("TypeError: key_lengths: expected an integer dtype", key_counts_decode, q, key_lengths=lengths.float())
    many = {"key_lengths": lengths, "query_lengths": lengths + 1}
    refuses("ValueError: query_lengths: expected values in [0, Sq = 6], got 7", key_counts_decode, q, **many)
