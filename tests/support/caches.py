"""A KV cache into which whole sequences are written step by step, with NaN wherever nothing has been written."""

from collections.abc import Callable

import torch
from torch import Tensor

import tritonattn
from tests.support.bound import assert_within_bound
from tests.support.calls import operands
from tests.support.eight_bit import along, descale_of, quantised
from tritonattn.core.call import AttentionCall
from tritonattn.core.terms import Terms
from tritonattn.core.visibility import Visibility

WILD_PAGES = (-1, 1 << 30)


def sequences(
    dtype=torch.float64, batch=2, heads=(4, 2), length=24, dims=(8, 6), seed=0, device="cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, Hq, S, D], k [B, Hkv, S, D] and v [B, Hkv, S, Dv] of whole sequences, of a fixed seed."""
    found = operands(dtype, batch, heads, (length, length), dims, seed).values()
    q, k, v = (x.detach().to(device) for x in found)
    return q, k, v


def cached_call(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor, block_table=None, row_counts=None, left=None, **given
) -> AttentionCall:
    """A call over a cache of k and v, as users have them, that no check has read; given: terms of its logits, and aux.

    Its scale is 0.25.
    """
    if block_table is not None:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    capacity = k.shape[2] * (1 if block_table is None else block_table.shape[1])
    sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], capacity)
    visible = Visibility.of_padded(sizes, q.device, key_lengths, row_counts, left=left)
    options = {"block_table": block_table, "aux": given.pop("aux", False), "backend": "sdpa", "cached": True}
    return AttentionCall(q, k, v, visible, Terms(0.25, **given), **options)


class GrowingCache:
    """The first lengths[b] tokens of sequence b, contiguous or in pages of shuffled numbers.

    block_table entries of pages that nothing has been written to are wild. record is the KeyStatistics that grows with
    the cache, or None.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, capacity: int, page: int | None = None, statistics: bool = False
    ) -> None:
        batch, kv_heads, _, head_dim = keys.shape
        self.keys, self.values, self.page = keys, values, page
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=keys.device)
        self.record = None
        self.numbers = None
        if page is None:
            slots = (batch, kv_heads, capacity)
        else:
            each = -(-capacity // page)
            capacity = each * page
            fixed = torch.Generator().manual_seed(1)  # a CPU's, whatever torch's default device
            numbers = torch.randperm(batch * each + 3, generator=fixed, device="cpu")
            self.numbers = numbers[: batch * each].view(batch, each).to(keys.device)
            slots = (batch * each + 3, page, kv_heads)
        self.k = keys.new_full((*slots, head_dim), torch.nan)
        self.v = keys.new_full((*slots, values.shape[3]), torch.nan)
        self.capacity = capacity
        if statistics:
            dtype = torch.promote_types(keys.dtype, torch.float32)
            self.record = tritonattn.KeyStatistics(batch, kv_heads, capacity, device=keys.device, dtype=dtype)

    def write(self, counts: int | list[int]) -> None:
        """Write the next tokens of every sequence; the record gets them padded with NaN."""
        batch = len(self.lengths)
        counts = [counts] * batch if isinstance(counts, int) else counts
        new = self.keys.new_full((*self.keys.shape[:2], max(counts), self.keys.shape[3]), torch.nan)
        for b, (start, count) in enumerate(zip(self.lengths.tolist(), counts, strict=True)):
            for i in range(start, start + count):
                slot = (b, slice(None), i)
                if self.page is not None:
                    slot = (int(self.numbers[b, i // self.page]), i % self.page)
                self.k[slot], self.v[slot] = self.keys[b, :, i], self.values[b, :, i]
            new[b, :, :count] = self.keys[b, :, start : start + count]
        counts = torch.tensor(counts, device=self.lengths.device)
        if self.record is not None:
            self.record.append(new, counts)
        self.lengths = self.lengths + counts

    def newest(self, x: Tensor, count: int) -> Tensor:
        """The rows of x [B, H, S, ...] that belong to the last `count` tokens of every sequence."""
        rows = [x[b, :, length - count : length] for b, length in enumerate(self.lengths.tolist())]
        return torch.stack(rows)

    def arguments(self) -> dict:
        """The arguments of attention_decode that describe the cache."""
        arguments = {"k_cache": self.k, "v_cache": self.v, "key_lengths": self.lengths}
        if self.numbers is not None:
            first = torch.arange(self.numbers.shape[1], device=self.k.device) * self.page
            wild = torch.tensor(WILD_PAGES, device=self.k.device)[torch.arange(len(first)) % 2]
            table = torch.where(first < self.lengths[:, None], self.numbers, wild)
            arguments["block_table"] = table.int()
        if self.record is not None:
            arguments["statistics"] = self.record
        return arguments


def check_rows_without_keys(capacity: int, page: int | None, dtype=torch.float64, device="cpu", **options) -> None:
    """Three rows of sequences of 0 and 2 keys: those before the first key have zeros, and the statistics of no key."""
    q, k, v = sequences(dtype, length=8, dims=(16, 16), device=device)
    cache = GrowingCache(k, v, capacity, page, statistics=True)
    cache.write([0, 2])
    found, aux = tritonattn.attention_decode(q[:, :, :3], **cache.arguments(), return_aux=True, **options)
    empty = torch.tensor([[True, True, True], [True, False, False]], device=device)[:, None].expand(2, 4, 3)
    assert (found[empty] == 0).all()
    assert found[~empty].isfinite().all()
    assert (found[~empty] != 0).all()
    assert torch.equal(aux.lse == -torch.inf, empty)
    assert torch.equal(aux.max_logit == -torch.inf, empty)
    assert (aux.entropy[empty] == 0).all()


def check_cuts(k: Tensor, cuts: list[tuple[int, ...]], append: Callable[[Tensor, tritonattn.KeyStatistics], None]):
    """Bits of a `KeyStatistics` after the keys k [B, Hkv, n, D] were appended in pieces, the same for each cut."""
    found = []
    for pieces in cuts:
        statistics = tritonattn.KeyStatistics(*k.shape[:3], device=k.device)
        for new in k.split(pieces, dim=2):
            append(new, statistics)
        found.append(statistics._buffers())
    for buffers in zip(*found, strict=True):
        for other in buffers[1:]:
            assert torch.equal(buffers[0][..., : k.shape[2] + 1], other[..., : k.shape[2] + 1])


def check_newest(
    dtype: torch.dtype,
    device: torch.device,
    written: tuple[int, int],
    length: int,
    capacity: int,
    *,
    heads: tuple[int, int],
    dims: tuple[int, int],
    count: int = 1,
    page: int | None = None,
    statistics: bool = True,
    window: tuple[int | None, int | None] | None = None,
    bias_heads: int | None = None,
    aux: bool = True,
    invariant: bool = False,
    eight_bit: str = "",
    lay: Callable[[Tensor], Tensor] = lambda x: x,
    **options,
) -> None:
    """Hold the newest rows of a cache, by backend "triton", to the bound of the same rows of one full pass.

    written      keys of each of two sequences, `count` new ones included; `length` are those of the full pass
    bias_heads   heads of a bias in which the first keys, in one head a whole split of them, have no weight
    eight_bit    the kind of descales of an 8-bit cache, as of `descale_of`; then rows are those over dequantised keys
    lay          copies of queries, keys and values in the memory that kernels get
    """
    q, k, v = sequences(dtype, heads=heads, length=length, dims=dims, device=device)
    held, bias = (k, v), None
    if eight_bit:
        descales = [descale_of(eight_bit, 2, heads[1], seed, device) for seed in (0, 1)]
        (k8, k), (v8, v) = (quantised(x.double(), along(descale)) for x, descale in zip((k, v), descales, strict=True))
        held, options = (k8, v8), options | dict(zip(("k_descale", "v_descale"), descales, strict=True))
    if bias_heads:
        bias = torch.randn(2, bias_heads, length, generator=torch.Generator().manual_seed(1)).to(device)
        bias[:, 0, :66], bias[..., ::7] = -torch.inf, -torch.inf
    plain = {name: x for name, x in options.items() if not name.endswith("descale")}
    whole = {"key_bias": bias, "causal": True, "window": window, "backend": "reference", "return_aux": True, **plain}
    exact, eager = (tritonattn.attention(*(x.to(one) for x in (q, k, v)), **whole) for one in (torch.float64, dtype))
    cache, record = GrowingCache(*held, capacity, page), None
    if statistics:
        wide = torch.promote_types(dtype, torch.float32)
        record = GrowingCache(k.to(wide) if eight_bit else k, v, capacity, page, True)
    for counts in ([end - count for end in written], count):
        cache.write(counts)
        record and record.write(counts)
    arguments = cache.arguments() | ({"statistics": record.record} if record else {})
    arguments |= {name: lay(arguments[name]) for name in ("k_cache", "v_cache")}
    if bias is not None:
        options["key_bias"] = torch.nn.functional.pad(bias, (0, cache.capacity - length), value=torch.nan)
    if "sinks" in options and options["sinks"].dim() == 3:
        options["sinks"] = cache.newest(options["sinks"], count)
    options |= {"window": window, "backend": "triton", "batch_invariant": invariant, "return_aux": aux}
    found = tritonattn.attention_decode(lay(cache.newest(q, count)), **arguments, **options)
    out, rows = found if aux else (found, None)
    assert_within_bound(out, cache.newest(exact[0], count), cache.newest(eager[0], count), dtype)
    for name, row in {} if rows is None else rows._asdict().items():
        expected = cache.newest(getattr(exact[1], name), count)
        torch.testing.assert_close(row.double(), expected, rtol=1e-5, atol=1e-5, msg=name)
