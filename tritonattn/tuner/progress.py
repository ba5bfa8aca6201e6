"""tqdm, or, where it is not installed (as on a bare GPU machine), one line to stderr now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any

_SECONDS_BETWEEN_LINES = 10.0


class Lines:
    """The part of tqdm that the commands use: iteration, `update`, `set_postfix_str`, and a `with` block."""

    def __init__(
        self, items: Iterable[Any] | None = None, total: int | None = None, desc: str = "", unit: str = "it"
    ) -> None:
        self.items, self.desc, self.unit, self.count, self.note = items, desc, unit, 0, ""
        self.total = len(items) if total is None and isinstance(items, Sized) else total
        self._shown = time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        for item in self.items or ():
            yield item
            self.update()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._show()

    def set_postfix_str(self, note: str) -> None:
        self.note = note

    def update(self, count: int = 1) -> None:
        self.count += count
        if time.monotonic() - self._shown > _SECONDS_BETWEEN_LINES:
            self._show()

    def _show(self) -> None:
        total = "" if self.total is None else f"/{self.total}"
        print(f"{self.desc} {self.count}{total} {self.unit} {self.note}".strip(), file=sys.stderr, flush=True)
        self._shown = time.monotonic()


try:
    from tqdm import tqdm
except ImportError:
    tqdm = Lines
