"""The fused pass over the keys and its way back."""

import pytest
import torch

from tests.kernels import harness
from tests.support.caches import check_cuts
from tests.support.pairs import in_turn
from tritonattn import KeyStatistics, attention
from tritonattn.backends import triton as triton_backend
from tritonattn.calls import key_statistics as cache_statistics
from tritonattn.core.call import AttentionCall
from tritonattn.core.norms import key_norms_of
from tritonattn.core.ranges import prefix_sum
from tritonattn.core.statistics import Statistics
from tritonattn.core.terms import Terms
from tritonattn.core.visibility import Visibility
from tritonattn.ops import KernelStatistics


@in_turn(sizes=[(1, 16), (37, 5), (130, 64), (600, 8)], dtype=[torch.float32, torch.float16, torch.bfloat16])
def test_norms_and_prefix_sums(dtype, sizes, device):
    k = torch.randn(2, 2, *sizes, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    norms = triton_backend.key_norms(k, None)
    exact = k.double().norm(dim=-1)
    torch.testing.assert_close(norms.double(), exact, rtol=1e-6, atol=0)
    for addends in (norms, norms.double().square()):
        sums = triton_backend.prefix_sums(addends)
        assert (sums[..., 0] == 0).all()
        torch.testing.assert_close(sums[..., 1:], addends.double().cumsum(-1), rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's
@pytest.mark.parametrize("of_heads", [1, 2])
def test_prefix_sums_begin_again(of_heads, device):
    """In one block and across blocks, which NaN and inf before do not pass."""
    random = torch.Generator().manual_seed(0)
    addends = torch.randn(2, 2, 850, generator=random).to(device)
    restarts = (torch.rand(2, of_heads, 850, generator=random) < 0.02).to(device)
    restarts[..., :300], restarts[..., [100, 500]] = False, True
    clean = triton_backend.prefix_sums(addends, restarts)
    torch.testing.assert_close(clean, prefix_sum(addends, restarts), rtol=1e-12, atol=1e-12)
    addends[..., 50], addends[..., 499] = torch.nan, torch.inf
    found = triton_backend.prefix_sums(addends, restarts)
    assert found[..., 51].isnan().all()
    assert torch.equal(found[..., 101:500], clean[..., 101:500])
    assert torch.equal(found[..., 501:], clean[..., 501:])


def test_unseen_keys_count_nothing(device):
    k = torch.ones(1, 1, 4, 16, device=device)
    k[:, :, 2] = float("nan")
    seen = torch.tensor([True, True, False, True], device=device)
    assert triton_backend.key_norms(k, seen).flatten().tolist() == [4, 4, 0, 4]


@pytest.mark.parametrize("size", [1e30, 1e-30, 0.0])
def test_any_finite_norm(size, device):
    k = torch.full((1, 1, 3, 16), size, device=device)
    norms = triton_backend.key_norms(k, None)
    torch.testing.assert_close(norms, torch.full_like(norms, 4 * size), rtol=1e-6, atol=0)
    d_k = triton_backend.key_norms_backward(k, None, norms, torch.ones_like(norms))
    torch.testing.assert_close(d_k, torch.full_like(k, 0.25 if size else 0.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mask", ["full", "causal", "ranges"])
def test_statistics_equal_those_of_torch(mask, device):
    k = torch.randn(2, 2, 40, 24, generator=torch.Generator().manual_seed(0)).to(device)
    visibility = Visibility.of(k.new_empty(2, 4, 21, 24), k, **harness.mask(mask, device, 2, 4, 21, 40))
    results = []
    for statistics_of in (KernelStatistics, Statistics):
        leaf = k.clone().requires_grad_()
        statistics = statistics_of(leaf, visibility)
        values = [statistics.norm_sum, statistics.norm_square_sum, statistics.norm_max]
        weights = torch.linspace(-1, 2, 21, device=device)
        total = sum((value * weights).sum() for value in values)
        results.append([*(value.detach() for value in values), torch.autograd.grad(total, leaf)[0]])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_keys_and_of_their_norms_are_added_before_they_are_rounded(dtype, device):
    random = torch.Generator().manual_seed(0)
    k, d_k = (torch.randn(2, 2, 33, 20, generator=random).to(dtype).to(device) for _ in range(2))
    seen = (torch.arange(33, device=device) < 30).expand(2, 2, -1)
    d_k[:, :, 30:] = 0
    d_norms = torch.randn(2, 2, 33, generator=random).to(device)
    leaf = k.clone().requires_grad_()
    visibility = Visibility.of(k, k, key_lengths=torch.tensor([30, 30], device=device))
    statistics = KernelStatistics(leaf, visibility)
    norms, call = statistics.norms, statistics.widened(AttentionCall(k, leaf, k, visibility, Terms(1.0)))
    assert call.q is k
    same = call.k
    assert torch.equal(same, leaf.float())
    assert same is not leaf
    assert same.dtype == torch.float32
    strided = d_k.transpose(2, 3).contiguous().transpose(2, 3)
    found = torch.autograd.grad((norms, same), leaf, (d_norms, strided.float()), retain_graph=True)[0]
    wide = k.double().requires_grad_()
    exact = d_k + torch.autograd.grad(key_norms_of(wide, seen), wide, d_norms.double())[0]
    torch.testing.assert_close(found, exact.to(dtype), rtol=1e-6, atol=1e-6)
    assert torch.equal(torch.autograd.grad(same, leaf, d_k.float())[0], d_k)


def _held(statistics: KeyStatistics) -> list[torch.Tensor]:
    """The valid part of the buffers, sequence by sequence."""
    parts = []
    for count, *buffers in zip(statistics.counts.tolist(), *statistics._buffers()[1:], strict=True):
        ends = (count, *[count + 1] * 3)
        parts += [buffer[:, :end].double() for buffer, end in zip(buffers, ends, strict=True)]
    return [statistics.counts, *parts]


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 7), (torch.bfloat16, 200)])
def test_keys_are_appended_as_by_torch(dtype, head_dim, device, monkeypatch):
    """One and many blocks of keys, none, keys that do not count, and keys past the capacity, which go unread."""
    random = torch.Generator().manual_seed(0)
    for module in ("key_statistics", "sequence_checks"):
        monkeypatch.setattr(f"tritonattn.calls.{module}.values_are_read", lambda *x: False)
    ours, theirs = (KeyStatistics(3, 2, 170, device=device) for _ in range(2))
    for new, counts in ((1, None), (130, [130, 0, 67]), (1, [0, 1, 1]), (3, None), (60, [60, -5, 99]), (2, None)):
        k = torch.randn(3, new, 2, head_dim, generator=random).to(dtype).to(device).transpose(1, 2)
        if new == 60:
            k[2, 1, 7, 0] = torch.nan
        if counts is not None:
            counts = torch.tensor(counts, dtype=torch.int32, device=device)
        for statistics, by_kernel in ((ours, True), (theirs, False)):
            monkeypatch.setattr(cache_statistics, "launches", lambda *x, by_kernel=by_kernel: by_kernel)
            statistics.append(k, counts)
        torch.testing.assert_close(_held(ours), _held(theirs), rtol=1e-6, atol=0, equal_nan=True)
    assert ours.counts.tolist() == [170, 7, 134]
    assert ours.norm_maxima[2, 1, 134].isnan()
    assert not ours.norm_maxima[2, 0, 134].isnan()


def test_many_keys_are_appended_in_steps(device, monkeypatch):
    monkeypatch.setattr(cache_statistics, "launches", lambda *x: True)
    k = torch.randn(2, 2, 2100, 8, generator=torch.Generator().manual_seed(0)).to(device)
    statistics = KeyStatistics(2, 2, 2100, device=device)
    statistics.append(k, torch.tensor([2100, 1030], device=device))
    norms = k.double().norm(dim=-1)
    for entry, count in enumerate((2100, 1030)):
        sums, maxima = (buffer[entry, :, 1 : count + 1] for buffer in statistics._buffers()[2::2])
        torch.testing.assert_close(sums, norms[entry, :, :count].cumsum(-1), rtol=1e-6, atol=0)
        torch.testing.assert_close(maxima.double(), norms[entry, :, :count].cummax(-1).values, rtol=1e-6, atol=0)


def test_sums_do_not_depend_on_how_keys_are_cut(device, monkeypatch):
    """Across blocks of sums, by calls that measure keys in the program and before it."""
    monkeypatch.setattr(cache_statistics, "launches", lambda *x: True)
    k = torch.randn(2, 2, 600, 8, generator=torch.Generator().manual_seed(0)).to(device)
    check_cuts(k, [(600,), (1, 64, 190, 1, 5, 300, 39), (255, 2, 343)], lambda new, ours: ours.append(new))


class _Other(torch.Tensor):
    """A tensor for which operators of torch.library are called."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v", "d_out"])
def test_gradients_where_an_operator_takes_over_after_norms_were_measured(name, device):
    random = torch.Generator().manual_seed(0)
    q, k, v, d_out = (torch.randn(1, 2, 20, 16, generator=random).bfloat16().to(device) for _ in range(4))

    def gradients(**other: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = {"v": v, "d_out": d_out} | other
        leaves = [x.detach().requires_grad_() for x in (q, k, given["v"])]
        out = attention(*leaves, scaling="cosine", causal=True, backend="triton")
        return torch.autograd.grad(out, leaves, given["d_out"])

    plain, other = gradients(), gradients(**{name: {"v": v, "d_out": d_out}[name].as_subclass(_Other)})
    for found, expected in zip(other, plain, strict=True):
        assert torch.equal(found.as_subclass(torch.Tensor), expected)
