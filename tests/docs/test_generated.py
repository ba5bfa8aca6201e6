"""The generated parts of the documents are those that the code writes now."""

import pytest

from docs import generated

STORED = {
    found[2]: (file, found[0])
    for file in generated.documents()
    for found in generated.PART.finditer(file.read_text(encoding="utf-8"))
}


INTERPRETED = ("support", "memory")  # the slow tier's


@pytest.mark.parametrize("name", [name for name in generated.PARTS if name not in INTERPRETED])
def test_part_is_not_stale(name):
    check_part(name)


def check_part(name: str) -> None:
    file, stored = STORED[name]
    assert generated.renewed(stored, {}) == stored, f"{file}: run python -m docs.generated --write"


def test_a_stale_part_is_found():
    stale = "<!-- generated: floors -->\nold\n<!-- end -->"
    assert generated.renewed(stale, {"floors": "new\n"}) == stale.replace("old", "new")
