"""The versions of a server for which a plugin was tested."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import version


@dataclass(frozen=True)
class Versions:
    """Versions of a package from `first` on, below `end`."""

    package: str
    first: str
    end: str

    def check(self) -> None:
        """Raise ImportError unless the installed package is one of them."""
        found, first, end = (
            [int(part) for part in re.findall(r"\d+", x)] for x in (self._found(), self.first, self.end)
        )
        if not first <= found < end:
            raise ImportError(self.expected())

    def expected(self) -> str:
        return f"{self.package}: expected version >={self.first},<{self.end}, got {self._found()}"

    def _found(self) -> str:
        return version(self.package)
