"""The command line: what a user reads when something is missing or wrong."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tritonattn.cli import env
from tritonattn.cli import main as cli
from tritonattn.cli.options import at_least
from tritonattn.core.errors import CommandError
from tritonattn.core.progress import Progress

ROOT = Path(__file__).resolve().parents[2]


def test_no_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert "command" in text
    for name, module in cli.COMMANDS.items():
        assert f"\n    {name}" in text
        assert " ".join(module.HELP.split()) in " ".join(text.split())


@pytest.mark.parametrize("least", [0, 1, 16])
def test_a_number_below_the_least_is_refused(least):
    parse = at_least("--steps", least)
    assert parse(str(least)) == least
    with pytest.raises(CommandError, match=f"--steps: expected at least {least}, got {least - 1}"):
        parse(str(least - 1))


# In place of torch, the first package that tritonattn imports.
INTERRUPTED_TORCH = """
import os, signal, time
os.kill(os.getpid(), signal.SIGINT)
time.sleep(20)
"""
SCRIPT = "import sys\nfrom tritonattn.cli.main import main\nsys.exit(main())\n"


@pytest.fixture
def interrupted(tmp_path):
    """Run python with Ctrl-C pressed while torch is imported."""
    (tmp_path / "torch.py").write_text(INTERRUPTED_TORCH)
    for name in ("tritonattn", "train.py"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(SCRIPT)

    def run(*arguments):
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        return subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.default_int_handler
            ),  # not ignored, as in background
        )

    return run


@pytest.mark.parametrize(
    "arguments", [("bin/tritonattn", "env"), ("-m", "tritonattn", "env"), ("-m", "perf", "codegen")], ids=" ".join
)
def test_interruption_of_imports_is_one_line(arguments, interrupted):
    done = interrupted(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_no_bar_is_drawn_into_a_file(capsys):
    for _ in Progress(range(3)):
        pass
    with Progress(total=2) as progress:
        progress.update()
        progress.set_description("a")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("length", [1, 100_000], ids=["buffered", "longer than the buffer"])
def test_a_reader_that_leaves_is_no_traceback(length, monkeypatch):
    """As `head` does."""
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(env, "run", lambda _: print("x" * length) or 0)
    with os.fdopen(writing, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["env"]) == 141
