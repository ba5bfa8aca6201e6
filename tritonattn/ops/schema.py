"""Names and schemas of the operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import Tensor

# The package's own name: "tritonattn", and in a kernel loaded from a hub the one that its loader gives to this copy.
NAMESPACE = __name__.split(".")[0]
OPERATORS: list[str] = []  # names without the namespace

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


def operator(name: str, arguments: str, results: str) -> Callable[[Callable], Any]:
    """Decorator: make a function an operator, which a process can register once.

    Sharding rules go by the names of tensors (`distributed/operators.py`): d_x is the gradient of x.
    """

    def register(function: Callable) -> Any:
        OPERATORS.append(name)
        schema = f"({arguments}) -> {results}"
        return torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=(), schema=schema)

    return register


def arguments_of(record: type) -> str:
    """The fields of a NamedTuple as arguments of an operator's schema."""
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(record).items())
