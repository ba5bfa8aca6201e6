"""Files written whole, and JSON: one value, or JSON lines that a run appends to and a later run reads again."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

try:
    import fcntl
except ImportError:  # on Windows, where writers take no turns
    fcntl = None

Record = TypeVar("Record")

# Options of tabulate for rows of a name and figures: text as it is, figures on the right.
FIGURES: dict[str, Any] = {"disable_numparse": True, "stralign": "right", "colalign": ("left",)}
_LONGEST_WAIT, _PAUSE = 60.0, 0.005  # seconds


def for_json(x: Any, digits: int | None = None) -> Any:
    """Replace floats that are not finite by None, in dicts and lists too; round the others to significant digits."""
    if isinstance(x, dict):
        return {name: for_json(value, digits) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [for_json(value, digits) for value in x]
    if not isinstance(x, float):
        return x
    if not math.isfinite(x):
        return None
    return x if digits is None else float(f"{x:.{digits}g}")


def write(file: Path, content: str | bytes | Callable[[], str | bytes]) -> None:
    """Replace a file at once: a reader, another writer and a full disk meet the old file or the new one.

    A function is called while other writers of the file wait, so that it may read the file and add to it. A temporary
    file that a killed writer has left is taken over. Writes through a link, to a device, and in a folder that takes no
    other file; there no one waits. Raises OSError that names the file, TimeoutError after a minute among them.
    """

    def data() -> bytes:
        made = content() if callable(content) else content
        return made.encode() if isinstance(made, str) else made

    unique = "" if fcntl else f"-{os.getpid()}"
    temporary = file.with_name(f".{file.name}{unique}.tmp")
    try:
        through = file.is_symlink() or (file.exists() and not file.is_file())
        if through or not os.access(file.parent, os.W_OK):
            file.write_bytes(data())
            return
        with _held(temporary):
            try:
                temporary.write_bytes(data())
                temporary.replace(file)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        if error.strerror is not None:
            error.filename = str(file)
        raise


@contextmanager
def _held(file: Path) -> Iterator[None]:
    """Keep a file, made where there is none, from others that ask for it; a killed process holds nothing.

    Raises TimeoutError.
    """
    end = time.monotonic() + _LONGEST_WAIT
    while fcntl is not None:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if _is_locked(descriptor) and _is_at(file, descriptor):
                yield
                return
        finally:
            os.close(descriptor)
        if time.monotonic() >= end:
            reason = f"expected other writers to end within {_LONGEST_WAIT:g} s, got one that holds the file: end it"
            raise TimeoutError(errno.ETIMEDOUT, reason, str(file))
        time.sleep(_PAUSE)
    yield


def _is_locked(descriptor: int) -> bool:
    assert fcntl is not None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise  # of a file system that has locks
    return True


def _is_at(file: Path, descriptor: int) -> bool:
    """False where the last holder has renamed or removed the file that was opened."""
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def write_json(file: Path, x: Any) -> None:
    """Write one value, indented; floats as in `for_json`."""
    write(file, json.dumps(for_json(x), indent=2, allow_nan=False) + "\n")


def append(file: Path, records: Iterable[dict[str, Any]], digits: int | None = None) -> None:
    """Append records as JSON lines in one write, so that an interruption leaves whole records or a torn last line.

    Other processes that append wait. A torn last line, which a killed run has left, is ended first. Floats as in
    `for_json`. Raises OSError, TimeoutError after a minute among them.
    """
    text = "".join(json.dumps(for_json(record, digits), allow_nan=False) + "\n" for record in records)
    with _held(file):
        descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            torn = os.lseek(descriptor, 0, os.SEEK_END) > 0
            if torn:
                os.lseek(descriptor, -1, os.SEEK_END)
                torn = os.read(descriptor, 1) != b"\n"
            left = ("\n" * torn + text).encode()
            while left:
                left = left[os.write(descriptor, left) :]
        finally:
            os.close(descriptor)


def read(file: Path, decode: Callable[[dict[str, Any]], Record], expected: str) -> list[Record]:
    """Read the records of a JSON lines file; none where there is no file.

    A line that is not JSON, or that `decode` refuses (ValueError, TypeError, KeyError), is skipped and named on stderr,
    with what was expected.
    """
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines() if file.exists() else (), 1):
        try:
            records.append(decode(json.loads(line)))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            print(f"{file}:{number}: expected {expected}, skipped: {error}", file=sys.stderr)
    return records
