"""`python -m tests.release.agreement TAG`: tag, version, CHANGELOG.md and repository agree; prints the version's notes.

Needs neither torch nor an installed tritonattn.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
_SECTION = re.compile(r"^## \[(?P<name>[^]]+)\](?: - (?P<date>\d{4}-\d{2}-\d{2}))?$", re.MULTILINE)


class Section(NamedTuple):
    """A version's part of the changelog; date "" where it has none."""

    name: str
    date: str
    text: str


def found(file: str, pattern: str) -> str:
    """The group of a pattern that stands once in a file of the checkout."""
    [value] = re.findall(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    return value


def version() -> str:
    return found("tritonattn/__init__.py", r'^__version__ = "(.+)"$')


def repository() -> str:
    return found("pyproject.toml", r'^Repository = "(.+)"$')


def sections(changelog: str) -> list[Section]:
    """The sections of a changelog, the newest first."""
    heads = list(_SECTION.finditer(changelog))
    ends = [head.start() for head in heads[1:]] + [len(changelog)]
    return [
        Section(head["name"], head["date"] or "", changelog[head.end() : end].strip())
        for head, end in zip(heads, ends, strict=True)
    ]


def notes(tag: str, version: str, changelog: str) -> str:
    """The text of the version's section; ValueError unless it is dated, the newest, and nothing is left unreleased."""
    if tag != f"v{version}":
        raise ValueError(f"tag: expected v{version}, as tritonattn/__init__.py says, got {tag}")
    unreleased, newest, *_ = sections(changelog)
    if (unreleased.name, unreleased.text) != ("Unreleased", ""):
        raise ValueError(f"CHANGELOG.md: expected an empty [Unreleased] above [{version}]")
    if newest.name != version or not newest.date:
        raise ValueError(f"CHANGELOG.md: expected [{version}] and a date, got [{newest.name}] {newest.date}".rstrip())
    return newest.text


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.release.agreement", description=__doc__)
    parser.add_argument("tag", help="such as v0.2.0")
    parser.add_argument("--repository", help="the address that pyproject.toml must name", default=repository())
    options = parser.parse_args()
    try:
        text = notes(options.tag, version(), (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
        if options.repository != repository():
            raise ValueError(f"Repository of pyproject.toml: expected {options.repository}, got {repository()}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
