"""`tritonattn tune`, `configs` and `env`: what they write, keep, print and refuse. Nothing is compiled or timed."""

import re

import pytest
import torch

triton = pytest.importorskip("triton")
from tritonattn.autotune.gate import Candidate, Code
from tritonattn.tuning.config import Problem, Target, TileConfig
from tritonattn.tuning.defaults import default_config
from tritonattn.tuning.table import Entry, Exact, Key, Table, kernels_fingerprint, keys, read_table, write_table

from .stubs import BEST, H100, KEYS, MEASURED, ONE, FakeCompiler, run

OF_ANOTHER = Entry(TileConfig(16, 32, 4, 2), "static", {"triton": "3.1.4"})


def test_unknown_names(user, capsys):
    for arguments, message in {
        "tune --static h1000": "--static: expected a100, a10",
        "tune --workers -1": "--workers: expected a whole number from 1 up, got '-1'",
        "tune --budget nan": "--budget: expected minutes, got nan",
        "tune --head-dims 63": "--head-dims: expected 40, 64, 72, 80",
        "tune --static a100 --quick": "--static: expected neither --calls nor --quick with it",
        "tune --calls x --dtypes fp16": "--calls: expected neither --head-dims nor --dtypes with it",
        "configs --gpu h1000": "configs: --gpu: expected a100, a10, l40s, h100, h200",
        "configs --gpu all": "sm_90, ..., got 'all'\n",
    }.items():
        status, _, err = run(capsys, *arguments.split())
        assert status == 2, arguments
        assert message in err


def test_a_static_table_is_written_for_the_user_or_shipped(user, tmp_path, capsys):
    status, out, _ = run(capsys, *ONE)
    assert status == 0
    table = read_table(user / "a100.json")
    assert {key: entry.config for key, entry in table.entries.items()} == dict.fromkeys(KEYS, BEST)
    assert table.kernels == kernels_fingerprint()
    assert "64 x 64, 4 warps, 2 stages" in out
    run(capsys, *ONE, "--write")
    assert (user / "a100.json").read_bytes() == (tmp_path / "shipped" / "a100.json").read_bytes()


def test_a_static_table_keeps_what_is_in_use_where_it_passes(user, tmp_path, monkeypatch, capsys):
    """Here a config that the shipped table has, not the first of the candidates."""
    shipped = Entry(TileConfig(64, 32, 4, 3), "static", {"triton": "3.1.4"})
    table = Table("a100", Target("cuda", "80"), kernels_fingerprint(), {KEYS[1]: shipped})
    write_table(tmp_path / "shipped" / "a100.json", table)

    def examine(self, wanted, progress=None):
        return [Candidate(config, Code(128, 0, 32768), ()) for _, _, config in wanted]

    monkeypatch.setattr(FakeCompiler, "examine", examine)
    run(capsys, *ONE)
    entries = read_table(user / "a100.json").entries
    assert entries[KEYS[1]].config == shipped.config
    assert entries[KEYS[1]].triton == triton.__version__
    assert entries[KEYS[0]].config == default_config("forward", KEYS[0].problem, Target("cuda", "80"))


def test_measured_entries_and_other_keys_are_kept(user, capsys):
    """Entries that were found for other code of the kernels are not."""
    measured = Entry(TileConfig(128, 64, 4, 2), "measured", {"milliseconds": 1.0})
    other = Key("decode", 64, "none", "long")
    before = {KEYS[0]: measured, other: Entry(TileConfig(16, 64, 4, 2), "static", {})}
    write_table(user / "a100.json", Table("a100", Target("cuda", "80"), kernels_fingerprint(), before))
    run(capsys, *ONE)
    entries = read_table(user / "a100.json").entries
    assert set(entries) == {*KEYS, other}
    assert entries[KEYS[0]] == measured
    assert entries[KEYS[1]].config == BEST
    write_table(user / "a100.json", Table("a100", Target("cuda", "80"), "0" * 16, before))
    _, out, _ = run(capsys, *ONE)
    assert re.search("not kept:.*of other kernels", out)
    assert {key: entry.config for key, entry in read_table(user / "a100.json").entries.items()} == dict.fromkeys(
        KEYS, BEST
    )


def test_configs_says_where_each_comes_from(user, tmp_path, capsys):
    entries = {Key("forward", 64, "none", "long"): MEASURED, Key("decode", 256, "none", "long"): OF_ANOTHER}
    single = Exact("forward", Problem(64, 64, torch.float16, mask=True))
    write_table(user / "h100.json", Table("h100", H100, kernels_fingerprint(), entries | {single: MEASURED}))
    shipped = {Key("forward", 128, "none", "long"): MEASURED}
    write_table(tmp_path / "shipped" / "h100.json", Table("h100", H100, kernels_fingerprint(), shipped))
    status, out, _ = run(capsys, "configs", "--gpu", "h100")
    assert status == 0
    lines = {line.split("|")[1].strip(): line for line in out.splitlines()[2:]}
    assert set(lines) == {*map(str, keys()), str(single)}
    assert " yours: h100.json, measured  " in lines["forward/64/none/long"]
    assert " yours: h100.json, static, for triton 3.1.4" in lines["decode/256/none/long"]
    assert " shipped: h100.json, measured  " in lines["forward/128/none/long"]
    assert "default" in lines["forward/64/none/short"]
