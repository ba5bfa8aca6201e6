"""Undoing a replacement inside a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ..core.optimizers import expect_steps
from ..core.torch_distributed import refuse_wrapped
from ..scaling import Scaling

if TYPE_CHECKING:
    from typing_extensions import Self

Change = tuple[str | None, Any, str, Any]  # the name of a replaced module, an owner, its attribute, the new value


class _Added:
    """Stands for an attribute that the owner itself did not have; a class stays itself in copies."""


class Replacement:
    """A replacement of modules inside a model: a context manager that undoes it.

    names   of the replaced modules in the model
    """

    def __init__(self, model: Any, wanted: str, changes: list[Change]) -> None:
        """Make the changes. Raises ValueError where there are none, and as `refuse_wrapped` for learned parameters."""
        if wanted and not changes:
            raise ValueError(f"model: expected {wanted}, got {type(model).__name__}")
        self.names: list[str] = []
        self._before: list[tuple[Any, str, Any]] = []
        self.change(model, changes)

    def change(self, model: Any, changes: list[Change]) -> None:
        values = [value for *_, value in changes if isinstance(value, nn.Module)]
        if any(next(_added(value), None) is not None for value in values):
            refuse_wrapped(model, "their layers in modules_to_save")
        self.names = list(dict.fromkeys([*self.names, *(name for name, *_ in changes if name is not None)]))
        for _, owner, attribute, value in changes:
            self.put(owner, attribute, value)
        owners = dict.fromkeys(owner for _, owner, *_ in changes if isinstance(owner, nn.Module))
        expect_steps(owners, _added)

    def put(self, owner: Any, attribute: str, value: Any) -> None:
        is_added = (attribute not in vars(owner) and hasattr(type(owner), attribute)) or not hasattr(owner, attribute)
        self._before.append((owner, attribute, _Added if is_added else getattr(owner, attribute)))
        _set(owner, attribute, value)

    def undo(self) -> None:
        """Put the former modules back; parameters that they share keep what they have learned since."""
        while self._before:  # the last first: layers may share a processor
            self.restore()

    def restore(self) -> None:
        """Undo the last change."""
        owner, attribute, before = self._before.pop()
        if before is _Added:
            delattr(owner, attribute)
        else:
            _set(owner, attribute, before)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def _added(owner: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of scalings in a module, without those that were the model's before."""
    return (x for part in owner.modules() if isinstance(part, Scaling) for x in part.parameters())


def _set(owner: Any, attribute: str, value: Any) -> None:
    """Set an attribute; torch replaces a module by nothing but a module."""
    if isinstance(getattr(owner, attribute, None), nn.Module) and not isinstance(value, nn.Module):
        delattr(owner, attribute)
    setattr(owner, attribute, value)
