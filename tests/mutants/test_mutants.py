"""The table of faults fits the code, and its runner tells a caught fault from a missed one; `make mutants` runs all."""

import ast

import pytest

from . import runner
from .table import ROOT, Mutant, read_table

MUTANTS = read_table()
COUNTS = "tests/scaling/test_values.py::test_counts"


def test_every_layer_has_faults():
    folders = {mutant.file.split("/")[0] for mutant in MUTANTS}
    assert folders >= {path.parent.name for path in (ROOT / "tritonattn").glob("*/__init__.py")} - {"cli"}


def test_code_stands_once_in_its_function_and_its_test_exists():
    for mutant in MUTANTS:
        place = mutant.place()
        assert ast.parse(place.replaced(mutant.fault))
        file, name = mutant.test.split("[")[0].split("::", 1)
        assert f"def {name.rsplit('::', 1)[-1]}(" in (ROOT / file).read_text(encoding="utf-8"), mutant.name


MOVED = """
class A:
    def f(self):
        return g(  # why
            'é', 'x',
        ) + 1


def f():
    return g('é', 'x')
"""


def test_layout_does_not_count_and_a_function_is_found_where_it_has_moved(tmp_path):
    (tmp_path / "tritonattn/core").mkdir(parents=True)
    (tmp_path / "tritonattn/core/there.py").write_text(MOVED, encoding="utf-8")
    mutant = Mutant("core/here.py", "A.f", "none", 'g("é", "x")', "0", COUNTS)
    assert "        return 0 + 1\n" in mutant.place(tmp_path).replaced(mutant.fault)
    with pytest.raises(ValueError, match=r"once in core/here\.py, got it 2 times"):
        mutant._replace(function="").place(tmp_path)
    with pytest.raises(ValueError, match=r"once in core/here\.py::A\.f, got it 0 times"):
        mutant._replace(code="h('é', 'x')").place(tmp_path)


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
        ("n.clamp(min=1.0).log()", "1 passed"),
        ("n.clamp(min=1).no_such_method()", "AttributeError"),
        ("__import__('time').sleep(600)", "stopped after 2 s"),
    ],
    ids=["nothing changes", "another error", "it hangs"],
)
def test_other_outcomes_are_no_catch(fault, said, why_not_caught, monkeypatch):
    if "sleep" in fault:
        monkeypatch.setattr(runner, "SECONDS", 2)
    mutant = Mutant("scaling/counts.py", "LogKeyCount._of_count", "none", "n.clamp(min=1).log()", fault, COUNTS)
    assert said in (why_not_caught(mutant) or "")
