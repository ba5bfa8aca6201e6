"""Launches of a program, recorded for `tritonattn tune --calls`: kernels, problems and sizes, no values of tensors."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..core import records
from .table import Exact, is_searched, parsed_file, shown

SCHEMA_VERSION = 1
_LARGEST = 2**40  # of a number in a file


@dataclass(frozen=True)
class Size:
    """The sizes of a call, whose `Problem` says which of them count.

    batch      batch entries, or sequences of a packed batch or a cache
    heads      query heads, of which `group` share a key head
    q_len      rows; of a packed batch, of its longest sequence
    k_len      keys likewise; of a cache, its capacity
    q_total    rows of all sequences of a packed batch
    k_total    keys likewise
    page       keys of a page
    left       keys of a window before a row's position
    right      keys behind it
    """

    batch: int
    heads: int
    q_len: int
    k_len: int
    group: int = 1
    q_total: int = 0
    k_total: int = 0
    page: int = 0
    left: int = 0
    right: int = 0

    def as_record(self) -> dict[str, int]:
        """The sizes that are not 0."""
        return {name: value for name, value in vars(self).items() if value}

    @property
    def kv_heads(self) -> int:
        return self.heads // self.group

    @property
    def logits(self) -> int:
        """Elements of the logits of all heads, hidden ones included."""
        return self.batch * self.heads * self.q_len * self.k_len


class Call(NamedTuple):
    """A launch of a tiled kernel: what selects its code, and its size."""

    of: Exact
    size: Size


class Calls:
    """The calls that were launched inside `record`, each with the number of its launches."""

    def __init__(self, counts: dict[Call, int] | None = None) -> None:
        self._counts = Counter(counts or {})
        self._lock = threading.Lock()  # a backward runs in a thread of autograd's

    def __len__(self) -> int:
        return len(self._counts)

    def __repr__(self) -> str:
        return f"Calls({len(self)} distinct launches, {sum(self._counts.values())} launches)"

    def counts(self) -> dict[Call, int]:
        """The number of launches by call, the most frequent first."""
        return dict(self._counts.most_common())

    def largest(self) -> dict[Exact, Size]:
        """The size of each problem's calls that make the most logits, all together; the busiest problem first."""
        work = {call: count * call.size.logits for call, count in self._counts.items()}
        found: dict[Exact, Size] = {}
        totals: Counter[Exact] = Counter()
        for call in sorted(work, key=work.__getitem__, reverse=True):
            found.setdefault(call.of, call.size)
            totals[call.of] += work[call]
        return {of: found[of] for of, _ in totals.most_common()}

    def add(self, call: Call) -> None:
        with self._lock:
            self._counts[call] += 1

    def write(self, path: str | Path) -> None:
        """Replace a file at once by these calls, as JSON. Raises ValueError where there are none; OSError."""
        if not self._counts:
            raise ValueError(
                "calls: expected launches inside `record`, got none: no call ran tritonattn's kernels in 16 bits "
                "(backend='triton' says why; batch_invariant fixes the tiles)"
            )
        found = [
            {"call": str(call.of), "count": count, "size": call.size.as_record()}
            for call, count in self.counts().items()
        ]
        text = json.dumps({"schema_version": SCHEMA_VERSION, "calls": found}, indent=1)
        records.write(Path(path), text + "\n")


# The recorders that are on; a launch asks whether there are any.
recorders: tuple[Calls, ...] = ()
_lock = threading.Lock()


@contextmanager
def record() -> Iterator[Calls]:
    """Collect the launches of kernels with a loop of products inside, those of all threads.

    Launches run as ever, and no value of a tensor is read: what counts is masks, scales, options, dtype and sizes.
    Lengths above 31 are rounded up to one of 16 an octave, so that a cache that grows is few calls. Left out are fp32
    and `batch_invariant` calls, for which tables hold nothing. A CUDA graph counts when it is captured, not when it is
    replayed.

    The `Calls` that it yields grows inside; `calls.write(path)` keeps it for `tritonattn tune --calls path`.

    >>> import torch, tritonattn
    >>> from tritonattn.tuning import record
    >>> q = torch.randn(1, 2, 64, 32)
    >>> with record() as calls:
    ...     out = tritonattn.attention(q, q, q, causal=True, backend="sdpa")  # takes no kernel of tritonattn's
    >>> calls
    Calls(0 distinct launches, 0 launches)
    """
    global recorders
    calls = Calls()
    with _lock:
        recorders = (*recorders, calls)
    try:
        yield calls
    finally:
        with _lock:
            recorders = tuple(one for one in recorders if one is not calls)


def note(of: Exact, size: Size) -> None:
    """Add a launch to all that record now, if tables may hold an entry for it."""
    if not (size.logits and is_searched(of.problem)):
        return
    lengths = {name: _rounded(getattr(size, name)) for name in _LENGTHS}
    call = Call(of, Size(**{**vars(size), **lengths}))
    for calls in recorders:
        calls.add(call)


_LENGTHS = ("q_len", "k_len", "q_total", "k_total", "left", "right")


def _rounded(length: int) -> int:
    """The least number of at most 5 leading bits that is not below."""
    step = 1 << max(0, length.bit_length() - 5)
    return -(-length // step) * step


def read_calls(path: str | Path) -> Calls:
    """The calls of a file. Raises TableError for a file that `Calls.write` did not write; FileNotFoundError."""
    return parsed_file(Path(path), _parse)


def _parse(record: Any) -> Calls:
    """Parse a call; raise ValueError where it is none."""
    if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"expected calls of schema_version {SCHEMA_VERSION}, got {shown(record)}")
    found = record.get("calls")
    if not isinstance(found, list) or not found:
        raise ValueError(f"calls: expected a list of launches, got {shown(found)}: nothing was recorded")
    counts: Counter[Call] = Counter()
    for one in found:
        if not isinstance(one, dict) or set(one) != {"call", "count", "size"}:
            raise ValueError(f"calls: expected call, count and size, got {shown(one)}")
        of = Exact.parse(one["call"])
        counts[Call(of, _size(of, one["size"]))] += _number(f"{of}: count", one["count"], 1)
    return Calls(counts)


def _size(of: Exact, record: Any) -> Size:
    """A size that a call of the problem can have. Raises ValueError."""
    names = Size.__dataclass_fields__
    if not isinstance(record, dict) or not {"batch", "heads", "q_len", "k_len"} <= set(record) <= set(names):
        raise ValueError(f"{of}: size: expected some of {', '.join(names)}, got {shown(record)}")
    size = Size(**{name: _number(f"{of}: {name}", value, 1) for name, value in record.items()})
    problem = of.problem
    possible = {
        "heads": size.heads % size.group == 0,
        "group": (size.group > 1) == problem.grouped,
        "page": (size.page > 0) == problem.block_table,
        "q_total": (size.q_total > 0) == (problem.sequences and of.kernel != "decode"),
        "k_total": (size.k_total > 0) == (size.q_total > 0),
    }
    for name, is_possible in possible.items():
        if not is_possible:
            raise ValueError(f"{of}: {name}: expected one of such calls, got {getattr(size, name)}")
    return size


def _number(name: str, value: Any, least: int) -> int:
    if type(value) is not int or not least <= value <= _LARGEST:
        raise ValueError(f"{name}: expected an integer from {least} to {_LARGEST}, got {shown(value)}")
    return value
