"""Commands of `python -m perf`, run in this process."""

from __future__ import annotations

from pathlib import Path

from perf.__main__ import main
from perf.records import Record, read

TINY = ("--device", "cpu", "--quick", "--lengths", "16", "--head-dims", "8", "--rounds", "1")


def sweep(json: Path, *options: str) -> list[Record]:
    """The records that a tiny sweep on the CPU leaves in its file."""
    main(["sweep", *TINY, "--json", str(json), *options])
    return read(json)
