"""Version, tag and changelog of a release."""

import re

import pytest

from . import agreement

DATED = "# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2026-11-29\n\n- New.\n\n## [0.1.0]\n\n- Old.\n"


def test_a_release_prints_its_notes():
    assert agreement.notes("v0.2.0", "0.2.0", DATED) == "- New."


@pytest.mark.parametrize(
    ("tag", "version", "old", "new", "said"),
    [
        ("v0.3.0", "0.2.0", "", "", r"tag: expected v0\.2\.0, .*, got v0\.3\.0"),
        ("0.2.0", "0.2.0", "", "", r"tag: expected v0\.2\.0, .*, got 0\.2\.0"),
        ("v0.3.0", "0.3.0", "", "", r"expected \[0\.3\.0\] and a date, got \[0\.2\.0\] 2026-11-29$"),
        ("v0.2.0", "0.2.0", " - 2026-11-29", "", r"expected \[0\.2\.0\] and a date, got \[0\.2\.0\]$"),
        ("v0.2.0", "0.2.0", "[Unreleased]\n", "[Unreleased]\n\n- Newer.\n", r"expected an empty \[Unreleased\]"),
        ("v0.2.0", "0.2.0", "## [Unreleased]\n", "", r"expected an empty \[Unreleased\]"),
    ],
)
def test_disagreement_is_named(tag, version, old, new, said):
    with pytest.raises(ValueError, match=said):
        agreement.notes(tag, version, DATED.replace(old, new, 1))


def test_the_changelog_ends_at_the_version():
    """Either the version is released and the newest section, or it comes next and has entries."""

    def numbers(name: str) -> list[int]:
        return [int(number) for number in name.split(".")]

    unreleased, *released = agreement.sections((agreement.ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert unreleased.name == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", section.name) and section.text for section in released)
    ordered = [numbers(section.name) for section in released]
    assert ordered == sorted(ordered, reverse=True)
    version = numbers(agreement.version())
    assert version == ordered[0] or (version > ordered[0] and unreleased.text)
