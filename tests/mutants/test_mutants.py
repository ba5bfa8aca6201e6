"""The table of faults fits the code, and its runner tells a caught fault from a missed one; `make mutants` runs all."""

import pytest

from . import runner
from .table import ROOT, Mutant, read_table

MUTANTS = read_table()
COUNTS = "tests/scaling/test_values.py::test_counts"


def test_every_layer_has_faults():
    folders = {mutant.file.split("/")[0] for mutant in MUTANTS}
    assert folders >= {path.parent.name for path in (ROOT / "tritonattn").glob("*/__init__.py")} - {"cli"}


def test_each_line_stands_once_in_its_file_and_its_test_exists():
    for mutant in MUTANTS:
        changed = mutant.applied((ROOT / mutant.path).read_text(encoding="utf-8"))
        assert compile(changed, mutant.path, "exec")
        file, name = mutant.test.split("[")[0].split("::", 1)
        assert f"def {name.rsplit('::', 1)[-1]}(" in (ROOT / file).read_text(encoding="utf-8"), mutant.name


@pytest.fixture(scope="module")
def why_not_caught():
    with runner.started(False, ["torch"]) as one:
        yield one.why_not_caught


def test_a_fault_is_caught(why_not_caught):
    (mutant,) = (one for one in MUTANTS if one.name == "weights of earlier tiles are not rescaled")
    assert why_not_caught(mutant) is None


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("return n.clamp(min=1.0).log()", "1 passed"),
        ("return n.clamp(min=1).no_such_method()", "AttributeError"),
        ("return __import__('time').sleep(600)", "stopped after 2 s"),
    ],
    ids=["nothing changes", "another error", "it hangs"],
)
def test_other_outcomes_are_no_catch(fault, said, why_not_caught, monkeypatch):
    if "sleep" in fault:
        monkeypatch.setattr(runner, "SECONDS", 2)
    mutant = Mutant("scaling/counts.py", "none", "return n.clamp(min=1).log()", fault, COUNTS)
    assert said in (why_not_caught(mutant) or "")
