"""Undoing an exchange inside a model."""

from __future__ import annotations

from typing import Any


class Replacement:
    """What was exchanged in a model; a context manager that undoes it.

    names   the exchanged modules, by their names in the model
    """

    def __init__(self, changes: list[tuple[Any, str, Any]], names: list[str]) -> None:
        self._changes = changes
        self.names = names

    def undo(self) -> None:
        """Put back what was there before; parameters that were shared keep what they learned since."""
        for owner, name, before in self._changes:
            setattr(owner, name, before)
        self._changes = []

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()
