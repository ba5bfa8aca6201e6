"""Every suite, tiny, on the CPU: records, checks before times, names of who was skipped, and going on after a stop."""

import pytest
import torch

pytest.importorskip("triton")
import tritonattn
from perf import attention_cases, contest, decode_cases, varlen_cases
from perf.__main__ import main
from perf.peers import PEERS
from perf.records import read
from perf.suites import SUITES

from .commands import TINY, sweep

FEW = ("--scalings", "sqrt_dim,key_norm_mean", "--peers", "sdpa,eager,flash-attn-2")


@pytest.mark.parametrize("suite", [name for name in SUITES if name != "ceilings"])
def test_every_suite(suite, tmp_path, capsys):
    records = sweep(tmp_path / "a.jsonl", "--suite", suite, *FEW)
    own = [record for record in records if record.suite == suite]
    assert {record.suite for record in records} == {suite, "ceilings"}
    ours = [record for record in own if record.contestant.startswith("tritonattn")]
    assert {record.scaling for record in ours} == {"sqrt_dim", "key_norm_mean"}
    assert {record.status for record in ours} == {"measured"}
    for record in own:
        if record.status != "measured":
            assert record.status == "skipped"
            assert record.reason
        elif record.contestant != "copy":
            assert record.error <= record.bound or record.contestant.startswith("pre-scaled")
            assert suite == "accuracy" or record.lower_ms <= record.median_ms <= record.upper_ms
    environment = own[0].environment
    assert environment.torch == torch.__version__
    assert environment.threads == torch.get_num_threads()
    assert environment.command.startswith(f"python -m perf sweep --suite {suite} --device cpu ")
    assert str(tmp_path) not in environment.command
    printed = capsys.readouterr().out
    assert f"## {suite}\n\nMeasured: {environment}" in printed


def test_peers_that_cannot_are_named_with_the_reason(tmp_path, capsys):
    peers = ",".join(name for name in PEERS if name != "flex")
    options = ("--suite", "forward", "--scalings", "sqrt_dim", "--dtypes", "bf16", "--peers", peers)
    records = sweep(tmp_path / "a.jsonl", *options)
    reasons = {record.contestant: record.reason for record in records if record.status == "skipped"}
    assert reasons["sdpa-flash sqrt_dim"] == "runs on a GPU, not on device cpu"
    for name in ("flash-attn-2", "flash-attn-3", "flash-attn-4", "xformers"):
        assert "is not installed" in reasons[f"{name} sqrt_dim"]
    printed = capsys.readouterr().out
    assert "- xformers: skipped in 2 cases: xformers.ops is not installed" in printed


def _spoiled(attend):
    def wrong(*args, **options):
        out = attend(*args, **options)
        return out + 0.1 * out.detach().abs().max()

    return wrong


@pytest.mark.parametrize(
    ("suite", "module", "name"),
    [
        ("forward", attention_cases, "attention"),
        ("accuracy", attention_cases, "attention"),
        ("varlen", varlen_cases, "attention_varlen"),
        ("decode", decode_cases, "attention_decode"),
    ],
)
def test_a_wrong_result_of_ours_fails_the_run(suite, module, name, tmp_path, monkeypatch):
    right = getattr(tritonattn, name)

    def chosen(*args, backend, **options):
        return (right if backend == "reference" else _spoiled(right))(*args, backend=backend, **options)

    monkeypatch.setattr(module.tritonattn, name, chosen)
    with pytest.raises(SystemExit, match=r"results are wrong[^$]*tritonattn[^$]* sqrt_dim: out: expected an error"):
        sweep(tmp_path / "a.jsonl", "--suite", suite, "--scalings", "sqrt_dim", "--peers", "none")
    wrong = [record for record in read(tmp_path / "a.jsonl") if record.status == "wrong"]
    assert wrong
    assert all(record.median_ms is None and record.error > record.bound for record in wrong)


def test_a_stopped_sweep_goes_on(tmp_path, monkeypatch, capsys):
    file, run, calls = tmp_path / "a.jsonl", contest.Contest.run, []

    def interrupted(self, *arguments):
        calls.append(self.axes)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(self, *arguments)

    monkeypatch.setattr(contest.Contest, "run", interrupted)
    options = ("--suite", "forward", "--scalings", "sqrt_dim,dim", "--peers", "none")
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", *TINY, "--json", str(file), *options])
    assert stopped.value.code == 130
    assert len(read(file)) == 3  # a matmul, a copy, and one of four cases
    assert "stopped: the same command goes on" in capsys.readouterr().err
    records = sweep(file, *options)
    assert len(records) == 6
    assert calls[4] == calls[3]
    assert "3 of 6 cases are in" in capsys.readouterr().err
    sweep(file, *options)
    assert len(calls) == 7
    sweep(file, *options, "--dtypes", "bf16")  # another command
    assert len(calls) == 13


def test_a_wrong_gradient_fails_the_run(tmp_path, monkeypatch):
    right = tritonattn.attention

    def wrong(q, k, v, *, backend, **options):
        out = right(q, k, v, backend=backend, **options)
        return out if backend == "reference" else out + 1e-2 * (v - v.detach())

    monkeypatch.setattr(tritonattn, "attention", wrong)
    with pytest.raises(SystemExit, match="tritonattn sqrt_dim: gradient of v: expected"):
        sweep(tmp_path / "a.jsonl", "--suite", "backward", "--scalings", "sqrt_dim", "--peers", "none")
