"""Undoing a replacement inside a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..core.optimizers import expect_steps
from ..core.torch_distributed import refuse_wrapped
from ..nn.learned import scaling_parameters

_ADDED = object()  # stands for an attribute that the owner itself did not have


class Replacement:
    """A replacement of modules inside a model: a context manager that undoes it.

    names   of the replaced modules in the model
    """

    def __init__(self, model: Any, wanted: str, changes: list[tuple[str, Any, str, Any]]) -> None:
        """Make the changes: (a module's name, owner, attribute, new value).

        Raises ValueError where there are none, and as `refuse_wrapped` where they add learned parameters.
        """
        if not changes:
            raise ValueError(f"model: expected {wanted}, got {type(model).__name__}")
        values = [value for *_, value in changes if isinstance(value, nn.Module)]
        if any(next(scaling_parameters(value), None) is not None for value in values):
            refuse_wrapped(model, "their layers in modules_to_save")
        self.names = list(dict.fromkeys(name for name, *_ in changes))
        self._before: list[tuple[Any, str, Any]] = []
        for _, owner, attribute, value in changes:
            self.put(owner, attribute, value)
        owners = dict.fromkeys(owner for _, owner, *_ in changes if isinstance(owner, nn.Module))
        expect_steps(owners, scaling_parameters)

    def put(self, owner: Any, attribute: str, value: Any) -> None:
        is_added = (attribute not in vars(owner) and hasattr(type(owner), attribute)) or not hasattr(owner, attribute)
        self._before.append((owner, attribute, _ADDED if is_added else getattr(owner, attribute)))
        _set(owner, attribute, value)

    def undo(self) -> None:
        """Put the former modules back; parameters that they share keep what they have learned since."""
        for owner, attribute, before in reversed(self._before):  # layers may share a processor
            if before is _ADDED:
                delattr(owner, attribute)
            else:
                _set(owner, attribute, before)
        self._before = []

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def _set(owner: Any, attribute: str, value: Any) -> None:
    """Set an attribute; torch replaces a module by nothing but a module."""
    if isinstance(getattr(owner, attribute, None), nn.Module) and not isinstance(value, nn.Module):
        delattr(owner, attribute)
    setattr(owner, attribute, value)
