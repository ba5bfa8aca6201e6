"""Names and schemas of the operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# The package's own name: "tritonattn", and in a kernel loaded from a hub the one that its loader gives to this copy.
NAMESPACE = __name__.split(".")[0]
OPERATORS: list[str] = []  # names without the namespace

SCHEMA_TYPES = {
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


def schema_of(arguments: Iterable[Any]) -> str:
    """Arguments, each with its `name` and type `kind`, as a schema has them."""
    return ", ".join(f"{SCHEMA_TYPES[one.kind]} {one.name}" for one in arguments)
