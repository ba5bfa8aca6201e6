"""The programs of docs/examples run as they stand; so do the examples in the docstrings."""

import doctest
import os
import re
import runpy
import subprocess
import sys

import pytest

from tests.support.snippets import ROOT

PROGRAMS = sorted((ROOT / "docs/examples").glob("*.py"))
KERNELS = ROOT / "docs/examples/kernel.py"  # a process of its own: it asks for Triton's interpreter
MODULES = [file for file in sorted((ROOT / "tritonattn").rglob("*.py")) if ">>> " in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("program", [file for file in PROGRAMS if file != KERNELS], ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")
def test_program_runs(program, capsys):
    if "transformers" in program.read_text(encoding="utf-8"):
        pytest.importorskip("transformers")
    runpy.run_path(str(program), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_kernels_run_without_a_gpu():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, KERNELS], env=environment, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 7
    assert all(float(error) <= 1e-5 * float(size) for error, size in re.findall(r"(\S+) of (\S+)$", done.stdout, re.M))


def test_a_page_names_each():
    page = (ROOT / "docs/examples.md").read_text(encoding="utf-8")
    assert [program.name for program in PROGRAMS if f"(examples/{program.name})" not in page] == []


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_docstrings(file):
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    result = doctest.testmod(pytest.importorskip(name, exc_type=ImportError))
    assert result.attempted == file.read_text(encoding="utf-8").count(">>> ")
    assert result.failed == 0
