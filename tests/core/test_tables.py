"""Tables as text."""

from tritonattn.core.tables import table

ROWS = [["a", 1, None], ["bbb", 22.5, " x "]]


def test_for_github():
    assert table(ROWS, ["name", "n", ""]).splitlines() == [
        "| name   |    n |    |",
        "|--------|------|----|",
        "| a      |    1 |    |",
        "| bbb    | 22.5 |  x |",
    ]


def test_for_a_terminal_with_headers_of_several_lines():
    assert table(ROWS, ["name", "max\np", "long name"], "simple", left=None).splitlines() == [
        "name    max    long name",
        "        p",
        "------  -----  -----------",
        "a       1",
        "bbb     22.5   x",
    ]
    assert table([], ["a"], "simple") == "a\n---"
