"""Undoing a replacement inside a model."""

from __future__ import annotations

from typing import Any


class Replacement:
    """A replacement of modules inside a model: a context manager that undoes it.

    names   of the replaced modules in the model
    """

    def __init__(self, changes: list[tuple[Any, str, Any]], names: list[str]) -> None:
        self._changes = changes
        self.names = names

    def undo(self) -> None:
        """Put the former modules back; parameters that they share keep what they have learned since."""
        for owner, name, before in self._changes:
            setattr(owner, name, before)
        self._changes = []

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()
