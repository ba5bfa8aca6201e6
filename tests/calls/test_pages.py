"""Ragged rows over paged caches: attention_varlen with a block table, attention_decode with query lengths."""

from contextlib import nullcontext

import pytest
import torch

import tritonattn
from tests.support.calls import TYPICAL
from tests.support.device_work import values_unread
from tests.support.packed import one_by_one
from tests.support.pages import PagedBatch
from tests.support.pairs import pairwise
from tritonattn import PagedKeyStatistics, Scales, Scaling, attention_decode, attention_varlen, nn
from tritonattn.scaling import SCALINGS


class FirstOfKeys(Scaling):
    """A user's mode that reads k."""

    name = "first of keys"

    def scales(self, q, k, visibility, statistics):
        return Scales(1.0, key=1 / (1 + k[..., 0].abs()))

    def multiplier(self, q, k, visible):
        return 1 / (1 + k[..., 0].abs())[..., None, :]


def learned(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0.5, 0.2)
    return module.double()


MODES = {**SCALINGS, "first of keys": FirstOfKeys, "power_law": lambda: learned(nn.PowerLaw(heads=4))}
SOME = (*TYPICAL, "power_law", "first of keys")
# Chunks of a prefill, single tokens, a prefix hit, guesses; sequences without rows, without keys.
ROWS, KEYS = (5, 1, 0, 33, 3, 4, 16), (21, 48, 7, 33, 2, 0, 40)
WINDOWS = {"full": (False, None), "causal": (True, None), "window": (True, (6, None)), "both sides": (False, (3, 2))}
FORMS = {
    "plain": lambda batch: {},
    "extras": lambda batch: {"softcap": 1.5, "sinks": torch.tensor([0.1, -3.0, 2.0, 0.0])},
    "bias": lambda batch: {"key_bias": torch.linspace(-1, 1, 4 * batch.packed.k_len).view(4, -1)},
}


def record_of(batch: PagedBatch, dtype=torch.float64) -> PagedKeyStatistics:
    record = PagedKeyStatistics(len(batch.pages), batch.page, 2, dtype=dtype)
    ends = batch.packed.arguments()["cu_seqlens_k"]
    record.append(batch.k, ends, key_lengths=batch.key_lengths, block_table=batch.table)
    return record


@pairwise(
    mode=SOME,
    way=["sdpa", "sdpa of a record", "reference"],
    layout=[(16, 0), (19, 1)],
    sight=WINDOWS,
    form=FORMS,
    is_read=[True, False],
)
@torch.no_grad()
def test_each_sequence_alone(mode, way, layout, sight, form, is_read):
    """is_read: True where values are read, as on a CPU; on a GPU they are not."""
    batch, scaling, (causal, window) = PagedBatch(ROWS, KEYS, *layout), MODES[mode](), WINDOWS[sight]
    gain = torch.linspace(-1, 1, batch.q.shape[0] * 4, dtype=torch.float64).view(4, -1)
    options = {"gain": gain, "causal": causal, "window": window, **FORMS[form](batch)}
    out, expected = one_by_one(batch.packed, batch.q, batch.k, batch.v, scaling=scaling, **options)
    arguments = {**batch.arguments(), **options, "scaling": scaling, "backend": way.split()[0], "return_aux": True}
    arguments["statistics"] = record_of(batch) if "record" in way else None
    arguments |= {} if is_read else {"max_seqlen_k": 1000, "max_seqlen_q": 50}
    with nullcontext() if is_read else values_unread():
        found, aux = attention_varlen(**arguments)
    torch.testing.assert_close(found, out, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(aux.lse, expected.lse, rtol=1e-9, atol=1e-11)


@pairwise(
    mode=SOME, dtype=[torch.float32, torch.bfloat16], sight=WINDOWS, recorded=[True, False], layout=[(16, 0), (23, 1)]
)
@torch.no_grad()
def test_the_bits_of_contiguous_keys(mode, dtype, sight, recorded, layout):
    batch, (causal, window) = PagedBatch(ROWS, KEYS, *layout, dtype=dtype), WINDOWS[sight]
    options = {"scaling": MODES[mode]().float() if mode == "power_law" else MODES[mode]()}
    options |= {"causal": causal, "window": window, "batch_invariant": True}
    statistics = record_of(batch, torch.float32) if recorded else None
    found = attention_varlen(**batch.arguments(), **options, statistics=statistics)
    assert torch.equal(found, attention_varlen(**batch.contiguous(), **options))


@pairwise(mode=SOME, window=[None, (6, None)], page=[None, 16], recorded=[True, False], backend=["sdpa", "reference"])
@torch.no_grad()
def test_decoding_of_as_many_tokens_as_each_sequence_has(mode, window, page, recorded, backend):
    rows, keys = (2, 0, 5, 1), (20, 7, 5, 48)
    batch, scaling = PagedBatch(rows, keys, page or 16), MODES[mode]()
    operands = (batch.q, batch.k, batch.v)
    expected, of_rows = one_by_one(batch.packed, *operands, scaling=scaling, causal=True, window=window)
    q, k, v = torch.full((4, 4, 5, 8), torch.nan, dtype=torch.float64), batch.k, batch.v
    cache = {"key_lengths": batch.key_lengths, "query_lengths": torch.tensor(rows)}
    for n, (part, _) in enumerate(batch.packed.sequences()):
        q[n, :, : rows[n]] = batch.q[part].transpose(0, 1)
    if page:
        cache |= {name + "_cache": batch.arguments()[name] for name in ("k", "v")} | {"block_table": batch.table}
        cache["statistics"] = record_of(batch) if recorded else None
    else:
        k, v = (torch.full((4, 2, 48, x.shape[2]), torch.nan, dtype=torch.float64) for x in (k, v))
        for n, (_, part) in enumerate(batch.packed.sequences()):
            k[n, :, : keys[n]], v[n, :, : keys[n]] = batch.k[part].transpose(0, 1), batch.v[part].transpose(0, 1)
        cache |= {"k_cache": k, "v_cache": v}
        if recorded:
            cache["statistics"] = tritonattn.KeyStatistics(4, 2, 48, dtype=torch.float64)
            cache["statistics"].append(k, batch.key_lengths)
    options = {"scaling": scaling, "window": window, "backend": backend, "return_aux": True}
    found, aux = attention_decode(q, **cache, **options)
    for n, (part, _) in enumerate(batch.packed.sequences()):
        torch.testing.assert_close(found[n, :, : rows[n]], expected[part].transpose(0, 1), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(aux.lse[n, :, : rows[n]], of_rows.lse[:, part], rtol=1e-9, atol=1e-11)
        assert not found[n, :, rows[n] :].any()
        assert (aux.lse[n, :, rows[n] :] == -torch.inf).all()


@pytest.mark.parametrize("is_read", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_statistics_do_not_depend_on_how_keys_came(dtype, is_read):
    """In one append, in chunks of ragged sizes, over rejected guesses, and by the definition."""
    batch = PagedBatch((0,) * len(KEYS), KEYS, 19, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    whole, chunked = record_of(batch, wide), PagedKeyStatistics(len(batch.pages), 19, 2, dtype=wide)
    held, total, draw = torch.zeros(len(KEYS), dtype=torch.int64), torch.tensor(KEYS), torch.Generator().manual_seed(1)
    first = batch.packed.arguments()["cu_seqlens_k"][:-1]
    for step in range(30):
        counts = (total - held).clamp(max=9)
        if step <= 22:
            counts = (torch.rand(len(KEYS), generator=draw) * (counts + 1)).long()
        new = torch.cat([batch.k[start : start + n] for start, n in zip(first + held, counts, strict=True)])
        new = new if is_read else torch.cat([new, torch.full_like(batch.k[:1], torch.nan)])
        ends, held = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int(), held + counts
        for keys in (torch.full_like(new, 7.0), new):  # first others, which are rejected
            with nullcontext() if is_read else values_unread():
                chunked.append(keys, ends, key_lengths=held, block_table=batch.table)
    assert torch.equal(held, total)
    for n, (_, keys) in enumerate(batch.packed.sequences()):
        key = torch.arange(KEYS[n])
        page, slot = batch.table[n][key // 19].long(), key % 19
        norms = batch.k[keys].double().norm(dim=-1)
        totals = norms.cumsum(0), norms.square().cumsum(0), norms.cummax(0).values if KEYS[n] else norms
        for found, at_once, expected in zip(chunked.buffers, whole.buffers, (norms, *totals), strict=True):
            assert torch.equal(found[page, slot], at_once[page, slot])
            rtol = 1e-6 if dtype == torch.bfloat16 else 1e-14
            torch.testing.assert_close(found[page, slot].double(), expected, rtol=rtol, atol=0)


def test_pages_that_lie_nowhere_are_zeros_where_they_are_not_read():
    batch = PagedBatch((2, 1), (20, 3), dtype=torch.float32)
    arguments = batch.arguments()
    arguments["block_table"] = torch.full_like(batch.table, 1 << 30)
    with values_unread():
        out, aux = attention_varlen(**arguments, return_aux=True)
        statistics = PagedKeyStatistics(len(batch.pages), 16, 2)
        ends, table = arguments["cu_seqlens_k"], arguments["block_table"]
        statistics.append(batch.k, ends, key_lengths=torch.tensor([1, -5]), block_table=table)
    assert not out.any()
    torch.testing.assert_close(aux.lse, torch.tensor([20.0, 20.0, 3.0]).log().expand(4, -1))
    assert not statistics.norms.any()


def test_keys_without_a_page_leave_page_0_as_it_is():
    statistics, ends = PagedKeyStatistics(2, 16, 2), torch.tensor([0, 3], dtype=torch.int32)
    arguments = {"key_lengths": torch.tensor([3]), "block_table": torch.zeros(1, 1, dtype=torch.int32)}
    statistics.append(torch.ones(3, 2, 4), ends, **arguments)
    held = [buffer.clone() for buffer in statistics.buffers]
    with values_unread():
        statistics.append(torch.ones(3, 2, 4), ends, **arguments | {"block_table": arguments["block_table"] - 1})
    assert all(map(torch.equal, statistics.buffers, held))


@torch.no_grad()
def test_pages_that_left_the_window_need_not_exist():
    batch = PagedBatch((2, 1), (40, 21))
    q = torch.stack([batch.q[:2], batch.q[1:3]]).transpose(1, 2)
    cache = {name + "_cache": batch.arguments()[name] for name in ("k", "v")}
    tables = [batch.table, batch.table.clone()]
    tables[1][0, :2], tables[1][1, 0] = -1, 1 << 30  # rows attend from key 32 and from key 16 on

    def outcome(table: torch.Tensor, left: int, lengths: torch.Tensor = batch.key_lengths) -> torch.Tensor | str:
        try:
            return attention_decode(q, **cache, key_lengths=lengths, block_table=table, window=(left, 0))
        except ValueError as error:
            return str(error).split(":")[0]

    expected, found = (outcome(table, 3) for table in tables)
    assert not isinstance(found, str)
    assert torch.equal(found, expected)
    for dtype in (torch.int64, torch.uint8):  # of which a length less rows and window may be no number
        lengths = batch.key_lengths.to(dtype)
        assert outcome(tables[1], 7, lengths) == "block_table"
        assert outcome(torch.full_like(tables[1], -1), 7, torch.full_like(lengths, 3)) == "block_table"
