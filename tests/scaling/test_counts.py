"""The values of the modes that count keys."""

import dataclasses
import math

import pytest
import torch

import tritonattn
from tritonattn.core.statistics import Statistics, counts_of
from tritonattn.core.visibility import Visibility
from tritonattn.scaling import KeyCount, LogKeyCount, SqrtKeyCount


def factors(scaling, rows=5, dim=16):
    """The factor of every row of a causal square."""
    q = k = torch.randn(1, 1, rows, dim)
    visibility = Visibility.of(q, k, causal=True)
    scales = scaling.scales(q, k, visibility, Statistics(k, visibility))
    return (scales.constant * scales.query).flatten().tolist()


def test_values():
    assert factors(KeyCount()) == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    assert factors(SqrtKeyCount()) == pytest.approx([n**-0.5 for n in range(1, 6)])
    assert LogKeyCount(512.0) == LogKeyCount(512.0) != LogKeyCount()
    assert factors(LogKeyCount()) == pytest.approx([math.log(n) / 4 for n in range(1, 6)])
    assert factors(LogKeyCount(base=5.0))[4] == pytest.approx(1 / 4), "as sqrt_dim at the base"


@pytest.mark.parametrize("base", [1.0, 0.5, -2, math.inf, math.nan, "e", None, True])
def test_bases_without_a_positive_logarithm_are_refused(base):
    with pytest.raises(ValueError, match=r"base: expected a finite number above 1, got"):
        LogKeyCount(base=base)


@pytest.mark.parametrize("name", ["key_count", "sqrt_key_count", "log_key_count", "qwen_logn", "llama4", "ministral3"])
@pytest.mark.parametrize("keys", [0, 1, 7, 20000])
def test_where_all_rows_see_all_keys_the_factor_is_a_number(name, keys):
    """The number is the factor of a causal mask's last row."""
    scaling = tritonattn.SCALINGS[name]()
    q, k = torch.empty(1, 1, 1, 4), torch.empty(1, 1, keys, 4)
    full, ranges = Visibility.of(q, k), Visibility.of(q, k, key_lengths=torch.tensor([keys]))
    alone = scaling.scales(q, k, full, Statistics(k, full))
    assert alone.query is None
    of_rows = scaling.scales(q, k, ranges, Statistics(k, ranges))
    assert alone.constant == pytest.approx((of_rows.constant * of_rows.query).item(), rel=1e-12)


def kept(k_len=7, inference=False, device="cpu", **mask):
    """`counts_of` 5 rows."""
    visibility = Visibility.of(torch.empty(2, 3, 5, 16), torch.empty(2, 3, k_len, 16), **mask)
    with torch.inference_mode(inference):
        return counts_of(dataclasses.replace(visibility, device=torch.device(device)))


def test_counts_of_sizes_are_kept():
    assert kept(causal=True) is kept(causal=True)
    assert kept(causal=True).flatten().tolist() == [3, 4, 5, 6, 7]
    assert kept(causal=True, k_len=6).flatten().tolist() == [2, 3, 4, 5, 6]
    assert kept(causal=True, window=(1, 0)).flatten().tolist() == [2, 2, 2, 2, 2]
    assert kept(causal=True, inference=True).is_inference()
    assert not kept(causal=True).is_inference()
    assert kept(causal=True, device="meta").device.type == "meta"
    lengths = torch.tensor([2, 7])
    assert kept(key_lengths=lengths) is not kept(key_lengths=lengths)


def test_counts_on_a_gpu_belong_to_a_stream_and_to_no_captured_graph(monkeypatch):
    stream, captured = [0], [False]
    monkeypatch.setattr(Visibility, "counts", lambda self: object())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured[0])
    first = kept(causal=True, device="cuda:0")
    captured[0] = True
    assert len({kept(causal=True, device="cuda:0") for _ in range(3)} | {first}) == 4
    captured[0] = False
    assert kept(causal=True, device="cuda:0") is first
    stream[0] = 1
    assert kept(causal=True, device="cuda:0") is not first
