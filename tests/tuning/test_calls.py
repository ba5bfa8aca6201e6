"""Recorded calls: what is kept of a launch, what a file says, and the entries of single problems."""

import json
from dataclasses import MISSING, asdict, fields, replace

import pytest
import torch

import tritonattn
from tritonattn.backends.triton import launch
from tritonattn.tuning import Problem, TileConfig, cache_dir, calls, lookup, record
from tritonattn.tuning.calls import Size, read_calls
from tritonattn.tuning.config import Target
from tritonattn.tuning.table import Entry, Exact, Key, Table, TableError, kernels_fingerprint, read_table, write_table

H100 = Target("cuda", "90", "NVIDIA H100 80GB HBM3")
HALF, BRAIN = torch.float16, torch.bfloat16
CAUSAL = Exact("forward", Problem(64, 64, BRAIN, right=True, grouped=True))
DECODE = Exact(
    "decode", Problem(64, 32, HALF, grouped=True, block_table=True, packed_rows=32, aligned=False, short=True)
)
SIZES = {CAUSAL: Size(1, 8, 2048, 2048, group=4), DECODE: Size(2, 64, 1, 64, group=32, page=16)}


@pytest.fixture
def unlaunched(monkeypatch):
    """Kernels that compute nothing."""
    monkeypatch.setattr(launch, "run", lambda *_: None)


def attend(length: int = 40, dtype: torch.dtype = BRAIN, **options) -> None:
    q, k, v = (torch.zeros(2, heads, length, 32, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
    tritonattn.attention(q, k, v, backend="triton", **options).sum().backward()


def test_a_training_step_is_recorded_with_its_group_lengths_and_window(unlaunched):
    """Forward and both gradients, of autograd's threads too; row terms have no tiles to choose."""
    with record() as outer:
        with record() as inner:
            attend(window=(7, 0))
        attend(100)
    attend()
    assert {str(call.of): (call.size, count) for call, count in inner.counts().items()} == {
        f"{kernel}/32/32/bfloat16/right+left+grouped+rounding+short": (Size(2, 4, 40, 40, group=2, left=7), 1)
        for kernel in ("forward", "grad_query", "grad_key_value")
    }
    assert {call.size for call in outer.counts()} == {
        Size(2, 4, 40, 40, group=2, left=7),
        Size(2, 4, 100, 100, group=2),
    }
    assert calls.recorders == ()


def test_decoding_and_packed_calls_are_recorded_with_their_pages_and_totals(unlaunched):
    cache, lengths = torch.zeros(8, 16, 2, 32, dtype=HALF), torch.tensor([50, 3], dtype=torch.int32)
    table, ends = torch.arange(8, dtype=torch.int32).view(2, 4), torch.tensor([0, 20, 64], dtype=torch.int32)
    packed = torch.zeros(64, 2, 32, dtype=HALF)
    with record() as found:
        tritonattn.attention_decode(
            torch.zeros(2, 8, 1, 32, dtype=HALF), cache, cache, key_lengths=lengths, block_table=table, backend="triton"
        )
        tritonattn.attention_varlen(packed, packed, packed, ends, ends, 44, 44, backend="triton")
    assert {call.of.kernel: call.size for call in found.counts()} == {
        "decode": Size(2, 8, 1, 64, group=4, page=16),
        "forward": Size(2, 2, 44, 44, q_total=64, k_total=64),
    }


def test_a_growing_cache_is_few_calls(unlaunched):
    with record() as found:
        for length in range(500, 600):
            q, k = torch.zeros(1, 2, 1, 32, dtype=HALF), torch.zeros(1, 2, length, 32, dtype=HALF)
            tritonattn.attention(q, k, k, backend="triton")
    assert [call.size.k_len for call in found.counts()] == [544, 576, 608, 512]
    assert sum(found.counts().values()) == 100


ONE = {"call": str(CAUSAL), "count": 1, "size": SIZES[CAUSAL].as_record()}
FAULTS = [
    ([], "nothing was recorded"),
    ([ONE | {"file": "/etc/passwd"}], "expected call, count and size"),
    ([ONE | {"call": "forward/64/64/float32/plain"}], "expected kernel/head_dim/value_dim/dtype/options"),
    ([ONE | {"call": "forward/64/64/float16/right+right"}], "expected kernel/head_dim/value_dim/dtype/options, got"),
    ([ONE | {"count": 0}], "count: expected an integer from 1"),
    ([ONE | {"size": {"batch": 1}}], "size: expected some of batch, heads"),
    ([ONE | {"size": ONE["size"] | {"batch": 10**300}}], "batch: expected an integer from 1 to"),
    ([ONE | {"size": ONE["size"] | {"heads": 6}}], "heads: expected one of such calls, got 6"),
    ([ONE | {"size": ONE["size"] | {"group": 1}}], "group: expected one of such calls, got 1"),
    ([ONE | {"size": ONE["size"] | {"page": 16}}], "page: expected one of such calls, got 16"),
    ([ONE | {"size": ONE["size"] | {"q_total": 16}}], "q_total: expected one of such calls, got 16"),
]


@pytest.mark.parametrize(("found", "message"), FAULTS, ids=[message for _, message in FAULTS])
def test_faults_of_a_file_of_calls(found, message, tmp_path):
    path = tmp_path / "calls.json"
    path.write_text(json.dumps({"schema_version": 1, "calls": found}), encoding="utf-8")
    with pytest.raises(TableError, match=rf"calls\.json: .*{message}"):
        read_calls(path)
    path.write_text(json.dumps({"schema_version": 2, "calls": [ONE]}), encoding="utf-8")
    with pytest.raises(TableError, match="expected calls of schema_version 1"):
        read_calls(path)


def test_every_field_of_a_problem_is_in_its_name():
    for field in fields(Problem):
        if field.default is not MISSING and field.name != "invariant":
            value = 64 if field.name == "packed_rows" else not field.default
            one = Exact("forward", Problem(64, 32, HALF, **{field.name: value}))
            assert Exact.parse(str(one)) == one != Exact("forward", Problem(64, 32, HALF))


def test_an_entry_of_a_problem_serves_it_alone_and_first(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_dir, "shipped_tables", lambda: tmp_path)
    monkeypatch.setattr(cache_dir, "user_cache", lambda: tmp_path)
    alone, others = TileConfig(64, 32, 4, 2), TileConfig(64, 64, 4, 2)
    key = Key("forward", 64, "none", "long")
    entries = {CAUSAL: Entry(alone, "measured", {}), key: Entry(others, "static", {})}
    path = lookup.user_table(H100)
    write_table(path, Table("h100", H100, kernels_fingerprint(), entries))
    assert read_table(path).entries == entries
    lookup.clear_cache()
    assert lookup.find("forward", CAUSAL.problem, H100)[:3] == (alone, path, CAUSAL)
    assert lookup.config_for("forward", replace(CAUSAL.problem, left=True), H100) == others
    assert lookup.config_for("forward", replace(CAUSAL.problem, invariant=True), H100) not in (alone, others)
    record = json.loads(path.read_text())
    record["entries"][str(CAUSAL)]["config"] = asdict(alone) | {"block_m": -1}
    path.write_text(json.dumps(record))
    with pytest.raises(TableError, match=rf"{CAUSAL}: block_m: expected 1 to 1024, got -1".replace("+", r"\+")):
        read_table(path)
    lookup.clear_cache()
