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
