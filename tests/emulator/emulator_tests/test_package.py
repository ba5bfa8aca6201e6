"""The folder stands alone: it could be a repository as it is."""

from __future__ import annotations

import ast
import re
import runpy
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "ptx_emulator": {"numpy", "torch", "triton"},
    "emulator_tests": {"numpy", "torch", "triton", "pytest", "ptx_emulator"},
}


def imported(path: Path) -> set[str]:
    """The packages that a file imports absolutely."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports(folder):
    for path in (ROOT / folder).glob("*.py"):
        without = {"triton"} if folder == "ptx_emulator" and path.stem != "compile" else set()
        assert imported(path) - sys.stdlib_module_names <= ALLOWED[folder] - without, path


def test_the_wheel_holds_the_package(tmp_path, monkeypatch):
    backend = pytest.importorskip("hatchling.build")
    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / backend.build_wheel(str(tmp_path))) as wheel:
        modules = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert modules == {path.relative_to(ROOT).as_posix() for path in (ROOT / "ptx_emulator").glob("*.py")}


def test_the_example_of_the_page(tmp_path, monkeypatch, capsys):
    knobs = pytest.importorskip("triton").knobs
    if knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile")
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    [code], [output] = (re.findall(f"```{language}\n(.*?)```", page, re.DOTALL) for language in ("python", "text"))
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path("example.py")
    said = capsys.readouterr().out
    line = re.compile(r"PTX line \d+: .*")  # the compiler's, with the file that it first saw
    assert line.sub("", said) == line.sub("", output)
