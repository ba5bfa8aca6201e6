"""`tritonattn tune`, `configs` and `env`: what they write, keep, print and refuse. Nothing is compiled or timed."""

import re
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

pytest.importorskip("triton")
from tritonattn.tuner.static import keys
from tritonattn.tuning.config import Problem, Target, TileConfig
from tritonattn.tuning.table import Entry, Exact, Key, Table, kernels_fingerprint, read_table, write_table

from .stubs import BEST, H100, KEYS, MEASURED, ONE, FakeCompiler, run

OF_ANOTHER = Entry(TileConfig(16, 32, 4, 2), "static", {"triton": "3.1.4"})


def test_unknown_names(user, capsys):
    for arguments, message in {
        "tune --static h1000": "--static: expected a100, a10",
        "tune --static ,": "--static: expected a100, a10",
        "tune --workers -1": "--workers: expected at least 1, got -1",
        "tune --budget nan": "--budget: expected minutes, got nan",
        "tune --kernels forwards": "--kernels: expected forward, grad_key_value, grad_query, decode, got 'forwards'",
        "tune --head-dims 63": "--head-dims: expected 40, 64, 72, 80",
        "tune --dtypes fp8": "--dtypes: expected bf16, fp16",
        "tune --static a100 --quick": "--static: expected neither --calls nor --quick beside it",
        "tune --static a100 --calls x": "--static: expected neither --calls nor --quick beside it",
        "tune --calls x --dtypes fp16": "--calls: expected neither --head-dims nor --dtypes beside it",
        "tune --lengths huge": "--lengths: expected short, long",
        "configs --gpu h1000": "configs: --gpu: expected a100, a10, l40s, h100, h200",
        "configs --gpu all": "sm_90, ..., got 'all'\n",
        "configs --gpu=": "sm_90, ..., got ''\n",
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


def test_configs_says_where_each_comes_from(user, capsys):
    entries = {Key("forward", 64, "none", "long"): MEASURED, Key("decode", 256, "none", "long"): OF_ANOTHER}
    own = Exact("forward", Problem(64, 64, torch.float16, mask=True))
    write_table(user / "h100.json", Table("h100", H100, kernels_fingerprint(), entries | {own: MEASURED}))
    status, out, _ = run(capsys, "configs", "--gpu", "h100")
    assert status == 0
    lines = {line.split("|")[1].strip(): line for line in out.splitlines()[2:]}
    assert set(lines) == {*map(str, keys()), str(own)}
    assert "h100.json, measured  " in lines["forward/64/none/long"]
    assert "h100.json, static, for triton 3.1.4" in lines["decode/256/none/long"]
    assert "default" in lines["forward/64/none/short"]


@pytest.mark.parametrize("arguments", [ONE, ["tune", *ONE[3:]]], ids=["static", "timed"])
def test_a_compiler_that_is_killed(arguments, on_h100, monkeypatch, capsys):
    def examine(self, wanted, progress=None):
        raise BrokenProcessPool("A process in the process pool was terminated abruptly")

    monkeypatch.setattr(FakeCompiler, "examine", examine)
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert "--workers" in err
