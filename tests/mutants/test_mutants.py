"""The table of faults fits the code, and its runner tells a caught fault from a missed one; `make mutants` runs all."""

import pytest

from . import runner
from .table import ROOT, Mutant, read_table

MUTANTS = read_table()
CHEAP = ["a key past the last visible one is kept", "weights of earlier tiles are not rescaled"]
COUNTS = "tests/scaling/test_counts.py::test_values"


def test_every_layer_has_faults():
    folders = {mutant.file.split("/")[0] for mutant in MUTANTS}
    assert len(MUTANTS) >= 60
    assert folders >= {path.parent.name for path in (ROOT / "tritonattn").glob("*/__init__.py")} - {"cli"}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_line_stands_once_in_its_file_and_the_test_exists(mutant):
    changed = mutant.applied((ROOT / mutant.path).read_text(encoding="utf-8"))
    assert compile(changed, mutant.path, "exec")
    file, name = mutant.test.split("[")[0].split("::", 1)
    assert f"def {name.rsplit('::', 1)[-1]}(" in (ROOT / file).read_text(encoding="utf-8")


def test_a_line_that_stands_twice_is_refused():
    mutant = Mutant("scaling/counts.py", "twice", "return", "return 1 +", COUNTS)
    with pytest.raises(ValueError, match=r"expected .return. once in tritonattn.scaling.counts.py, got it 2 times"):
        mutant.applied("return 1\nreturn 2")


@pytest.mark.parametrize("block", ["a name alone", "file: name\n- line\n+ fault", "name\n- line\n+ fault\ntest"])
def test_a_block_that_is_no_fault_is_refused(block):
    with pytest.raises(ValueError, match=r"table.txt: expected file: name, - line, \+ fault and a test, got"):
        read_table(block)


@pytest.fixture(scope="module")
def why_not_caught():
    with runner.started(True, ["torch"]) as interpreting, runner.started(False, ["torch"]) as other:
        yield lambda mutant: (interpreting if mutant.is_interpreted else other).why_not_caught(mutant)


@pytest.mark.parametrize("name", CHEAP)
def test_a_fault_is_caught(name, why_not_caught):
    assert why_not_caught(next(mutant for mutant in MUTANTS if mutant.name == name)) is None


@pytest.mark.parametrize(
    ("fault", "said"), [("n.clamp(min=1.0).log())", "1 passed"), ("n.clamp(min=1).no_such_method())", "AttributeError")]
)
def test_neither_a_change_of_nothing_nor_another_error_is_a_catch(fault, said, why_not_caught):
    mutant = Mutant("scaling/counts.py", "none", "n.clamp(min=1).log())", fault, COUNTS)
    assert said in (why_not_caught(mutant) or "")


def test_a_test_that_hangs_is_stopped_and_no_catch(why_not_caught, monkeypatch):
    monkeypatch.setattr(runner, "SECONDS", 2)
    mutant = Mutant("scaling/counts.py", "hangs", "n.clamp(min=1).log())", "__import__('time').sleep(600))", COUNTS)
    assert "stopped after 2 s" in (why_not_caught(mutant) or "")
