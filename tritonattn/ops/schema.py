"""Names and schemas of the operators."""

from __future__ import annotations

from typing import get_type_hints

from torch import Tensor

# The package's own name: "tritonattn", and in a kernel loaded from a hub the one that its loader gives to this copy.
NAMESPACE = __name__.split(".")[0]

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    int: "SymInt",
    int | None: "SymInt?",
    bool: "bool",
    str: "str",
}


def qualified(operator: str) -> str:
    """The full name of an operator; a process can register it once."""
    return f"{NAMESPACE}::{operator}"


def arguments_of(record: type) -> str:
    """The fields of a NamedTuple as arguments of an operator's schema."""
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(record).items())
