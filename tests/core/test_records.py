"""JSON lines, appended whole and read again after an interruption; the machine, versions and commit with them."""

import errno
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tritonattn.core import provenance, records
from tritonattn.core.provenance import Environment, digest


@pytest.mark.parametrize("before", ["", '{"a": 1}\n', '{"a": 1}\n{"to'], ids=["new", "whole", "torn"])
def test_a_torn_line_is_ended_before_others_follow(before, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(before)
    records.append(file, [{"a": 2}, {"a": 3}])
    ended = before if before.endswith("\n") or not before else f"{before}\n"
    assert file.read_text() == f'{ended}{{"a": 2}}\n{{"a": 3}}\n'


@pytest.mark.parametrize("old", ["old", None])
def test_a_full_disk_leaves_the_old_file_or_none(old, tmp_path, monkeypatch):
    file, link = tmp_path / "a.json", tmp_path / "link"
    link.symlink_to(file)
    if old is not None:
        records.write(link, old)  # through it
        assert link.is_symlink()

    def torn(path, data):
        with path.open("wb") as opened:
            opened.write(data[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(Path, "write_bytes", torn)
        with pytest.raises(OSError, match="No space") as error:
            records.write(file, "longer")
    assert error.value.filename == str(file)
    assert sorted(tmp_path.iterdir()) == [file, link][old is None :]
    assert (file.read_text() if file.exists() else None) == old
    with pytest.raises(IsADirectoryError):
        records.write(tmp_path, "")


def several(code, file, count=4):
    """Run code in processes at once, each with its number and a file as its arguments."""
    begin = "import sys, time, json\nfrom pathlib import Path\nfrom tritonattn.core import records\n"
    begin += "number, file = int(sys.argv[1]), Path(sys.argv[2])\n"
    commands = [[sys.executable, "-c", begin + code, str(number), str(file)] for number in range(count)]
    statuses = [process.wait(60) for process in [subprocess.Popen(command) for command in commands]]
    assert statuses == [0] * count


takes_turns = pytest.mark.skipif(sys.platform == "win32", reason="no locks are taken there")

ADDING = """
def joined():
    before = json.loads(file.read_text()) if file.exists() else {}
    time.sleep(0.002)
    return json.dumps({**before, f"{number}-{i}": i})
while len(list(file.parent.glob("at-*"))) < 4:
    (file.parent / f"at-{number}").touch()
for i in range(15):
    records.write(file, joined)
"""


@takes_turns
def test_writers_that_read_and_add_keep_each_others_entries(tmp_path):
    """As `tritonattn tune` does in several processes, on the user's table of one GPU."""
    file = tmp_path / "a.json"
    several(ADDING, file)
    assert set(json.loads(file.read_text())) == {f"{number}-{i}" for number in range(4) for i in range(15)}
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", *(f"at-{number}" for number in range(4))}


SLOW = """
import os
write = os.write
def halved(descriptor, data):
    time.sleep(0.001)
    return write(descriptor, data[: max(1, len(data) // 2)])
os.write = halved
while len(list(file.parent.glob("at-*"))) < 4:
    (file.parent / f"at-{number}").touch()
for i in range(15):
    records.append(file, [{"number": number, "i": i}])
"""


@takes_turns
def test_writers_that_append_leave_whole_records(tmp_path):
    """Where a write takes its time, and half of the record comes first."""
    file = tmp_path / "a.jsonl"
    several(SLOW, file)
    records_made = [{"number": number, "i": i} for number in range(4) for i in range(15)]
    assert sorted(file.read_text().splitlines()) == sorted(map(json.dumps, records_made))


KILLED = """
import os, signal
Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
records.write(file, "torn, and longer")
"""


@takes_turns
def test_what_a_killed_writer_leaves_goes_with_the_next(tmp_path):
    file = tmp_path / "a.json"
    with pytest.raises(AssertionError, match=rf"\[-{int(signal.SIGKILL)}\] =="):
        several(KILLED, file, count=1)
    assert len(list(tmp_path.iterdir())) == 1
    records.write(file, "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "new")]


@takes_turns
def test_a_wait_for_another_writer_ends_in_a_message(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_LONGEST_WAIT", 0.02)
    file = tmp_path / "a.json"
    expected = "expected other writers to end within 0.02 s, got one that holds the file: end it: .*a.json"
    with pytest.raises(TimeoutError, match=expected):
        records.write(file, lambda: records.write(file, "inner") or "outer")
    assert list(tmp_path.iterdir()) == []


@takes_turns
def test_a_lock_of_a_file_that_the_last_writer_renamed_is_none(tmp_path, monkeypatch):
    """One writer ends between the next one's opening of the temporary file and its lock; a third then has to wait."""
    file, is_locked, late = tmp_path / "a.json", records._is_locked, []

    def after_another(descriptor):
        if not late:
            late.append(True)
            records._is_locked = is_locked
            (tmp_path / ".a.json.tmp").replace(file)
        return is_locked(descriptor)

    def third():
        with pytest.raises(TimeoutError):
            records.write(file, "third")
        return "second"

    monkeypatch.setattr(records, "_LONGEST_WAIT", 0.02)
    monkeypatch.setattr(records, "_is_locked", after_another)
    records.write(file, third)
    assert file.read_text() == "second"


def test_other_lines_are_named_and_skipped(tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    assert records.read(file, dict, "a record") == []
    file.write_text('{"a": 1}\n[]\n{"b": 2}\n{"a": 3}\n{"a')
    assert records.read(file, lambda values: values["a"], "a record") == [1, 3]
    named = capsys.readouterr().err.splitlines()
    assert [line.split(": expected a record, skipped: ")[0] for line in named] == [f"{file}:{n}" for n in (2, 3, 5)]


def test_an_environment_names_machine_versions_and_commit():
    here = Environment.of(torch.device("cpu"))
    assert (here.torch, here.threads, here.commit) == (torch.__version__, torch.get_num_threads(), provenance.commit())
    for part in (here.device, here.commit, f"torch {here.torch}"):
        assert part in str(here)


def test_the_first_installed_package_has_a_version(monkeypatch):
    """As on Windows, where triton-windows brings the module triton."""

    def version(package: str) -> str:
        if package != "triton-windows":
            raise provenance.metadata.PackageNotFoundError(package)
        return "3.8.0.post29"

    monkeypatch.setattr(provenance.metadata, "version", version)
    assert provenance.version(*provenance.TRITON) == "3.8.0.post29"
    assert provenance.version("triton") == "not installed"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_packages_checkout(tmp_path, monkeypatch):
    module = tmp_path / "tritonattn" / "core" / "provenance.py"
    module.parent.mkdir(parents=True)
    module.write_text("a")
    monkeypatch.setattr(provenance, "__file__", str(module))
    assert provenance.commit() == f"unknown (code {digest(tmp_path)})"

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    clean = provenance.commit()
    assert git("rev-parse", "HEAD").startswith(clean)
    module.write_text("b")
    assert provenance.commit() == f"{clean} (code {digest(tmp_path)})"
