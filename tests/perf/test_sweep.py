"""Every suite, tiny, on the CPU: records, checks before times, names of who was skipped, and going on after a stop."""

import pytest
import torch

from perf.__main__ import main
from perf.cases import contest
from perf.cases.records import read
from perf.sweep.suites import SUITES

from .commands import TINY, sweep

FEW = ("--scalings", "sqrt_dim,key_norm_mean", "--peers", "sdpa,eager,flash-attn-2")


@pytest.mark.slow
def test_every_suite(tmp_path, capsys):
    records = sweep(tmp_path / "a.jsonl", "--suite", ",".join(SUITES), *FEW)
    assert {record.suite for record in records} == {*SUITES}
    for record in records:
        if record.status != "measured":
            assert record.status == "skipped"
            assert record.reason
        elif "dropout" in record.case and record.contestant == f"eager {record.scaling}":
            assert record.error is None  # it draws other masks
        elif record.suite != "ceilings" and record.contestant != "copy":
            assert record.error <= record.bound or record.contestant.startswith("pre-scaled"), record
            assert record.suite == "accuracy" or record.lower_ms <= record.median_ms <= record.upper_ms
    for suite in {*SUITES} - {"ceilings"}:
        ours = [one for one in records if one.suite == suite and one.contestant.startswith("tritonattn")]
        assert {(one.scaling, one.status) for one in ours} == {("sqrt_dim", "measured"), ("key_norm_mean", "measured")}
    environment = records[0].environment
    assert environment.torch == torch.__version__
    assert environment.threads == torch.get_num_threads()
    assert environment.command.startswith("python -m perf sweep --suite forward,")
    assert str(tmp_path) not in environment.command
    printed = capsys.readouterr().out
    assert all(f"## {suite}\n\nMeasured: {environment}" in printed for suite in SUITES)


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


def test_only_the_named_cases_run(tmp_path):
    options = ("--suite", "forms", "--scalings", "sqrt_dim", "--only")
    records = sweep(tmp_path / "a.jsonl", *options, "causal, return_aux")
    assert {record.axes["form"] for record in records} == {"causal, return_aux"}
    with pytest.raises(SystemExit, match="--only: expected text of an axis of a case, got 'tanh'"):
        main(["sweep", *TINY, *options, "tanh"])
