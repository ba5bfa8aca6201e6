"""What a document's figures say about where they come from."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tritonattn.core import provenance
from tritonattn.core.provenance import Environment, command_line


def test_an_environment_names_machine_versions_and_commit():
    own = Environment.of(torch.device("cpu"))
    assert own.torch == torch.__version__
    assert own.threads == torch.get_num_threads()
    assert re.fullmatch(r"unknown|[0-9a-f]{7,}(-dirty)?|.+-g[0-9a-f]+(-dirty)?", own.commit)
    for part in (own.device, own.commit, f"torch {own.torch}"):
        assert part in str(own)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_packages_checkout(tmp_path, monkeypatch):
    module = tmp_path / "tritonattn" / "provenance.py"
    module.parent.mkdir()
    module.write_text("a")
    monkeypatch.setattr(provenance, "__file__", str(module))
    assert provenance.commit() == "unknown"

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    assert git("rev-parse", "HEAD").startswith(provenance.commit())
    module.write_text("b")
    assert provenance.commit().endswith("-dirty")


@pytest.mark.parametrize(
    ("program", "wanted"),
    [("/a/bin/tritonattn", "tritonattn"), ("/a/tritonattn/__main__.py", "python -m tritonattn")],
)
def test_a_command_can_be_typed_again(program, wanted, monkeypatch):
    monkeypatch.setattr("sys.argv", [program, "train-compare", "--modes", "sqrt_dim*1.1", "--out", str(Path("a b"))])
    assert command_line() == f"{wanted} train-compare --modes 'sqrt_dim*1.1' --out 'a b'"
