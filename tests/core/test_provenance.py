"""The machine, versions and commit that a document's figures name."""

import re
import shutil
import subprocess

import pytest
import torch

from tritonattn.core import provenance
from tritonattn.core.provenance import Environment, digest


def test_an_environment_names_machine_versions_and_commit():
    own = Environment.of(torch.device("cpu"))
    assert own.torch == torch.__version__
    assert own.threads == torch.get_num_threads()
    assert re.fullmatch(r"(unknown|[0-9a-f]{7,}|.+-g[0-9a-f]+)( \(code [0-9a-f]{12}\))?", own.commit)
    for part in (own.device, own.commit, f"torch {own.torch}"):
        assert part in str(own)


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
