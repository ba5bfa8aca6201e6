"""The command line: what a user reads when something is missing or wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tritonattn.cli import demo, env
from tritonattn.cli import main as cli
from tritonattn.cli.options import at_least, require
from tritonattn.core.errors import CommandError
from tritonattn.scaling import SCALINGS


def stderr_of(*arguments: str, capsys) -> str:
    assert cli.main(["demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_no_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    assert "command" in capsys.readouterr().err


@pytest.mark.parametrize("least", [0, 1, 16])
def test_a_number_below_the_least_is_refused(least):
    parse = at_least("--steps", least)
    assert parse(str(least)) == least
    with pytest.raises(CommandError, match=f"--steps: wanted at least {least}, got {least - 1}"):
        parse(str(least - 1))


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ("--model", "--text", "--modes", "--device", "--json", "--plot", "--max-tokens"):
        assert option in text


def test_default_modes_exist_and_are_at_least_six():
    modes = demo.MODES.split(",")
    assert len(modes) >= 6
    assert set(modes) <= set(SCALINGS)


def test_a_missing_extra_names_the_command_that_mends_it():
    with pytest.raises(CommandError, match=r"needs no_such_module; to mend it: pip install 'tritonattn\[demo\]'"):
        require("the demo", ["sys", "no_such_module"], "demo")


def test_the_command_line_without_its_extras():
    code = """
import sys
from tritonattn.cli import options
options.find_spec = lambda name: None
from tritonattn.cli.main import main
sys.exit(main(["demo"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "transformers" in done.stderr
    assert "pip install 'tritonattn[demo]'" in done.stderr
    assert "Traceback" not in done.stderr


HEAVY = {"transformers", "matplotlib", "sklearn", "scipy", "tqdm", "tabulate", "triton"}


def test_help_imports_nothing_that_only_some_commands_need():
    code = """
import sys, torch
before = set(sys.modules)
from tritonattn.cli.main import main
for arguments in ["--help"], ["train-compare", "--help"], ["tune", "--help"]:
    try:
        main(arguments)
    except SystemExit as done:
        assert done.code == 0
print(*{name.split(".")[0] for name in set(sys.modules) - before}, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added = set(done.stderr.split())
    assert "tritonattn" in added
    assert not added & HEAVY
    for name in cli.COMMANDS:
        assert f"\n    {name} " in done.stdout or f"\n    {name}\n" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--modes", "sqrt_dim,no_such_mode"], ["--modes", "'no_such_mode'", "sqrt_dim"]),
        (["--modes", "__import__('os').abort()"], ["--modes", "abort"]),
        (["--modes", ","], ["--modes", "got ''"]),
        (["--device", "no_such_device"], ["--device", "no_such_device"]),
        (["--text", "/no/such/file"], ["--text", "/no/such/file"]),
        (["--json", "/dev/null/a.json"], ["--json: wanted a folder", "'/dev/null'"]),
        (["--json", "/"], ["--json: wanted a file that can be written", "'/'"]),
        (["--plot", "a.xyz"], ["--plot", "a.xyz", "png"]),
        (["--max-tokens", "1"], ["--max-tokens", "at least 2"]),
        (["--model", __file__], ["--model", ".gguf"]),
    ],
)
def test_wrong_usage_is_named_before_any_work(arguments, parts, capsys):
    message = stderr_of(*arguments, capsys=capsys)
    for part in parts:
        assert part in message


def test_an_unknown_model_without_network(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = stderr_of("--model", "no-such-user/no-such-model", capsys=capsys)
    assert "no-such-user/no-such-model" in message
    assert "HF_HUB_OFFLINE" in message


def test_interruption_is_no_traceback(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "require", interrupted)
    assert cli.main(["demo"]) == 130


@pytest.mark.parametrize("length", [1, 100_000], ids=["buffered", "longer than the buffer"])
def test_a_reader_that_leaves_is_no_traceback(length, monkeypatch):
    """As `head` does."""
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(env, "run", lambda _: print("x" * length) or 0)
    with os.fdopen(writing, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["env"]) == 141
