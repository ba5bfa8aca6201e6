"""The command line: messages where something is missing or wrong, and how many threads a command takes."""

import argparse
import os
import shlex
import sys
from pathlib import Path

import pytest
import torch

import tritonattn
from tritonattn.cli import machine, options, threads
from tritonattn.cli import main as cli
from tritonattn.core import errors
from tritonattn.core.errors import install
from tritonattn.core.progress import Progress


def test_no_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert "command" in text
    for name, command in cli.COMMANDS.items():
        assert f"\n    {name}" in text
        assert " ".join(command.help.split()) in " ".join(text.split())


def test_env_names_the_version_that_runs(monkeypatch, capsys):
    """An editable install keeps the version that it had when it was made."""
    monkeypatch.setattr(machine, "version", lambda *packages: "of packages")
    assert cli.main(["env"]) == 0
    assert capsys.readouterr().out.startswith(f"tritonattn: {tritonattn.__version__}\n")


@pytest.mark.parametrize(
    ("parse", "taken", "refused"),
    [
        (options.number(2), {"2": 2, " 7 ": 7}, ("1", "x", "-3", "2.0", "")),
        (options.number(1, 9), {"9": 9}, ("0", "10")),
        (options.numbers(2, 9), {"9,2,9": (9, 2)}, ("2,,3", "1", "2,x")),
        (options.chosen((64, 128)), {"128, 64": (64, 128)}, ("96", ",")),
    ],
    ids=["from", "to", "several", "chosen"],
)
def test_types_of_options(parse, taken, refused):
    assert {text: parse(text) for text in taken} == taken
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match=r"expected .*, got "):
            parse(text)


def test_no_bar_is_drawn_into_a_file(capsys):
    for _ in Progress(range(3)):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("length", [1, 100_000], ids=["buffered", "longer than the buffer"])
def test_a_reader_that_leaves_is_no_traceback(length, monkeypatch):
    """As `head` does."""
    reading, writing = os.pipe()
    os.close(reading)
    told = cli.COMMANDS["env"]._replace(run=lambda _: print("x" * length) or 0)
    monkeypatch.setitem(cli.COMMANDS, "env", told)
    with os.fdopen(writing, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["env"]) == 141


CORES = ("cpu0", "cpu1", "cpu2", "cpu3")


@pytest.mark.parametrize(
    ("idle", "wanted"), [((1, 1, 1, 1), 4), ((1, 0.9, 0.4, 0), 2), ((0, 0, 0, 0), 1), ((0, 0, 0, 1), 1)]
)
def test_as_many_threads_as_idle_cores(idle, wanted, monkeypatch):
    """Four cores are each idle for a share of the time that they are watched."""
    given = []
    monkeypatch.setattr(threads, "usable_cores", lambda: len(CORES))
    monkeypatch.setattr(torch, "get_num_threads", lambda: len(CORES))
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(threads.time, "sleep", lambda seconds: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    seconds = [dict.fromkeys(CORES, 7.0), {core: 7.0 + x * 0.2 for core, x in zip(CORES, idle, strict=True)}]
    monkeypatch.setattr(threads, "_idle_seconds", iter(seconds).__next__)
    threads.limit_threads()
    assert given == [wanted]


REFUSED = [
    ("compare --modes sqrt_dim,no_such_mode", ["--modes", "'no_such_mode'", "sqrt_dim"]),
    ("demo --device no_such_device", ["--device", "no_such_device"]),
    ("compare --text /no/such/file", ["--text", "/no/such/file"]),
    ("compare --json /dev/null/a.json", ["--json: expected a folder", "'/dev/null'"]),
    ("compare --plot a.xyz", ["--plot", "a.xyz", "png"]),
    (f"compare --model {shlex.quote(__file__)}", ["--model", ".gguf"]),
    ("simulate --modes sqrt_dim,nope", ["--modes", "'nope'", "key_norm_sum"]),
    ("simulate --parts papers", ["--parts", "'papers'", "paper, sweep, verdict"]),
    ("simulate --seed -1", ["--seed", "-1"]),
    ("simulate --dims 0", ["--dims", "from 1", "'0'"]),
    ("simulate --keys gauss", ["--keys", "'gauss'", "few giants"]),
    (f"simulate --plot {shlex.quote(__file__)}", ["--plot", Path(__file__).name]),
    ("advise --context 0", ["--context: expected a whole number from 2 up"]),
    ("advise --model /nowhere/model", ["--model: cannot load"]),
]


def assert_refused(capsys: pytest.CaptureFixture[str], command: str, parts: list[str]) -> None:
    """`tritonattn COMMAND` exits with 2, prints nothing, and says all parts on stderr."""
    assert cli.main(shlex.split(command)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    for part in (f"tritonattn {command.split()[0]}: ", *parts):
        assert part in captured.err


@pytest.mark.parametrize("words", [["--nonsense", "3"], ["nonsense"]])
def test_a_word_that_is_no_command_is_not_named_as_one(words, capsys):
    assert cli.main(words) == 2
    assert capsys.readouterr().err.startswith("tritonattn: argument command: ")


def test_a_mistyped_command_brings_the_nearest(capsys):
    for word, hint in (("comapre", "; did you mean compare?\n"), ("zzz", ")\n")):
        assert cli.main([word]) == 2
        assert capsys.readouterr().err.endswith(hint)


@pytest.mark.parametrize(("command", "parts"), REFUSED, ids=[command for command, _ in REFUSED])
def test_wrong_usage_is_named_before_any_work(command, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert_refused(capsys, command, parts)


def test_an_unknown_model_without_network(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_refused(capsys, "compare --model no-such-user/no-such", ["no-such-user/no-such", "HF_HUB_OFFLINE"])


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("compare", ["transformers", install("demo")]),
        ("simulate --plot x", [f"simulate needs tqdm, matplotlib; to mend it: {install('perf')}"]),
        ("watch run.jsonl", [f"watch needs matplotlib; to mend it: {install('monitor')}"]),
    ],
)
def test_a_missing_extra_is_named(command, parts, monkeypatch, capsys):
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    assert_refused(capsys, command, parts)


def test_an_extra_comes_from_the_checkout_or_to_the_installed_package(monkeypatch, tmp_path):
    assert install("hf") == f'pip install -e "{Path(__file__).resolve().parents[2]}[hf]"'
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "tritonattn" / "core" / "errors.py"))
    assert install("hf") == 'pip install "tritonattn[hf]"'
