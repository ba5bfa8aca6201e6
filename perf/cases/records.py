"""Results files: JSON lines of records, appended as soon as a case is done."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tritonattn.core import records as files
from tritonattn.core.provenance import Environment

Axis = str | int | float | bool


@dataclass(frozen=True)
class Record:
    """The result of one contestant in one case.

    axes        names and values that make the case (length, head_dim, dtype, causal, passes, ...)
    status      "measured"; "skipped", not installed or unable to do the case; "inexact", a peer with an error beyond
                the bound; "wrong", ours with such an error, or a peer that is far off; "failed", our code raised.
                `reason` says why.
    *_ms        milliseconds of a call over rounds: median and quartiles
    modelled_ms what `perf.models.modelled` says of a call of ours; None where it has no model
    tflops      10^12 floating-point operations a second, by perf/cases/work.py
    gbps        10^9 bytes a second, of the bytes that must move
    ratio       time over that of `baseline`: the median over rounds, in which all take turns
    error       largest |result - float64| over the largest |float64|, of the worst result; None for NaN
    bound       that error's bound, likewise
    card        clocks, temperature, power and driver of a GPU, right after the last round
    """

    suite: str
    axes: dict[str, Axis]
    contestant: str
    scaling: str
    status: str
    environment: Environment
    date: str
    reason: str = ""
    median_ms: float | None = None
    lower_ms: float | None = None
    upper_ms: float | None = None
    rounds: int | None = None
    modelled_ms: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    ratio: float | None = None
    baseline: str | None = None
    error: float | None = None
    bound: float | None = None
    card: dict[str, str] = field(default_factory=dict)

    @property
    def case(self) -> str:
        return case_name(self.axes)

    def values(self) -> dict[str, Any]:
        """Return the contents of a line: required fields, and the optional ones that are set."""
        required = {one.name for one in fields(self) if one.default is MISSING and one.default_factory is MISSING}
        return {
            name: x for name, x in files.for_json(asdict(self)).items() if name in required or x not in (None, "", {})
        }

    @property
    def origin(self) -> str:
        """The origin of its times: a card, a CPU, or a stand-in for a card, by which they mean nothing."""
        stand_ins = {"emulate": "Emulated (times mean nothing)", "interpret": "Interpreted (times mean nothing)"}
        found = (text for device, text in stand_ins.items() if f"--device {device}" in self.environment.command)
        return next(found, "Measured")

    @property
    def is_bad(self) -> bool:
        """True where it makes a run fail."""
        return self.status in ("wrong", "failed")


def case_name(axes: dict[str, Axis]) -> str:
    return " ".join(f"{name}={value}" for name, value in axes.items())


class ResultsFile:
    """A file that records are appended to, case by case; None keeps nothing.

    A case that the file has from the same command and commit is done, unless it was wrong or failed.
    """

    def __init__(self, path: Path | None, environment: Environment) -> None:
        self.path, self.environment = path, environment
        known = [] if path is None else read(path)
        known = [record for record in known if record.environment == environment]
        again = {(record.suite, record.case) for record in known if record.is_bad}
        self.records = [record for record in known if (record.suite, record.case) not in again]
        self._done = {(record.suite, record.case) for record in self.records}

    def has(self, suite: str, axes: dict[str, Axis]) -> bool:
        return (suite, case_name(axes)) in self._done

    def append(self, records: list[Record]) -> None:
        """Append all records of a case in one write: an interrupted case leaves none."""
        self.records += records
        self._done |= {(record.suite, record.case) for record in records}
        if self.path is not None:
            files.append(self.path, (record.values() for record in records))


def read(path: Path) -> list[Record]:
    """Read the records of a file; other lines are named on stderr and skipped."""
    return files.read(path, _decoded, "a record of `perf sweep`")


def _decoded(values: dict[str, Any]) -> Record:
    return Record(**values | {"environment": Environment(**values["environment"])})


def read_all(paths: Iterable[Path]) -> list[Record]:
    """Read several files; of records of the same case, contestant and environment keep the last."""
    found: dict[tuple, Record] = {}
    for path in paths:
        if not path.is_file():
            print(f"{path}: no such file, skipped", file=sys.stderr)
            continue
        for record in read(path):
            found[record.suite, record.case, record.contestant, record.environment] = record
    return list(found.values())
