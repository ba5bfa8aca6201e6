"""Commands of `python -m perf`, run in this process."""

from pathlib import Path

import torch

from perf.__main__ import main
from perf.cases.records import Record, read
from tritonattn.core.provenance import Environment

CPU = torch.device("cpu")
HERE = Environment.of(CPU, "test")
TINY = ("--device", "cpu", "--quick", "--lengths", "16", "--head-dims", "8", "--rounds", "1")


def sweep(json: Path, *options: str) -> list[Record]:
    """The records that a tiny sweep on the CPU leaves in its file."""
    main(["sweep", *TINY, "--json", str(json), *options])
    return read(json)


def statuses(records: list[Record]) -> dict[str, tuple[str, str]]:
    """The status of every contestant, and its reason."""
    return {record.contestant: (record.status, record.reason) for record in records}
