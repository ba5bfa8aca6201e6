"""Operators: their schemas, an attention call as their arguments and back, and their vmap rules.

The record of a call says which arguments there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from ..core.call import AttentionCall
from ..core.dropout import Dropout
from ..core.sequences import Sequences
from ..core.terms import Gradients, Terms
from ..core.visibility import Visibility

# The package's name: "tritonattn", and in a kernel loaded from a hub the one that its loader gives to this copy.
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


_RECORDS = (Visibility, Terms, Dropout, Sequences)
# Parts that are not arguments: sizes, which tensors have, and what has done its work before a backend is called.
_SIZES = ("batch", "q_heads", "kv_heads", "q_len")
_NO_ARGUMENTS = {("visibility", name) for name in (*_SIZES, "counted")}


@dataclass(frozen=True)  # Dynamo of torch 2.8 takes no property of a NamedTuple
class Argument:
    """A leaf of the record, by its path and type: one of its types, where it can have several.

    The type has None too where a record on the path may be missing.
    """

    path: tuple[str, ...]
    type: Any
    name: str

    @property
    def is_tensor(self) -> bool:
        return Tensor in (self.type, *get_args(self.type))


def _leaves(record: type, path: tuple[str, ...] = (), optional: bool = False) -> Iterator[Argument]:
    for field, hint in get_type_hints(record).items():
        inside, parts = (*path, field), get_args(hint) or (hint,)
        inner = next((part for part in parts if part in _RECORDS), None)
        if inside in _NO_ARGUMENTS:
            continue
        if inner is not None:
            yield from _leaves(inner, inside, optional or type(None) in parts)
        elif hint in SCHEMA_TYPES:
            name = "_".join(inside) if inside[0] == "dropout" else field
            yield Argument(inside, hint | None if optional else hint, name)


def _rank(argument: Argument) -> tuple[int, bool]:
    """The order of tensors: first, as in `Gradients`, the ones that can have a gradient, then others."""
    fields = Gradients._fields
    return fields.index(argument.name) if argument.name in fields else len(fields), not argument.is_tensor


ARGUMENTS = tuple(sorted(_leaves(AttentionCall), key=_rank))
NAMES = tuple(argument.name for argument in ARGUMENTS)
SCHEMA = ", ".join(f"{SCHEMA_TYPES[argument.type]} {argument.name}" for argument in ARGUMENTS)
GRADIENTS = len(Gradients._fields)
TENSORS = sum(argument.is_tensor for argument in ARGUMENTS)

# By the path of a record: its fields that are arguments, and their numbers.
_FIELDS: dict[tuple[str, ...], list[tuple[str, int]]] = {}
for _number, _argument in enumerate(ARGUMENTS):
    _FIELDS.setdefault(_argument.path[:-1], []).append((_argument.path[-1], _number))


def flat(call: AttentionCall) -> list[Any]:
    """The arguments of a call."""
    values: list[Any] = [None] * len(ARGUMENTS)
    for path, fields in _FIELDS.items():
        record: Any = call
        for name in path:
            record = None if record is None else getattr(record, name)
        if record is not None:
            for name, number in fields:
                values[number] = getattr(record, name)
    return values


def call_of(values: Sequence[Any], visible: Visibility | None = None) -> AttentionCall:
    """The call of these arguments. visible: its visibility, where that is at hand."""
    q, k = values[0], values[1]
    found = [*values, q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.device]
    for record, pick in _PARTS:
        part = pick(found)
        found.append(None if part[0] is None else record(*part))
    found.append(Visibility(*_OF_VISIBILITY(found)) if visible is None else visible)
    return AttentionCall(*_OF_CALL(found))


# `call_of` appends to the arguments sizes, the device, then each record, before the records that hold it.
_APPENDED = (*_SIZES, "device", "sequences", "dropout", "terms", "visibility")


def _picks(record: Any, path: tuple[str, ...]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Pick the fields of a record, in its order, out of what `call_of` has found."""
    numbers = {argument.path: number for number, argument in enumerate(ARGUMENTS)}
    appended = {(*path, name): len(ARGUMENTS) + number for number, name in enumerate(_APPENDED)}
    names = (name for name in get_type_hints(record) if name not in ("counted", "_kept"))
    return itemgetter(*((appended | numbers)[(*path, name)] for name in names))


_PARTS = [
    (Sequences, _picks(Sequences, ("visibility", "sequences"))),
    (Dropout, _picks(Dropout, ("dropout",))),
    (Terms, _picks(Terms, ("terms",))),
]
_OF_VISIBILITY, _OF_CALL = _picks(Visibility, ("visibility",)), _picks(AttentionCall, ())


def without_repeats(call: AttentionCall) -> AttentionCall:
    """The call without a tensor that is two arguments: torch.compile refuses those in an autograd function."""
    q, k, v, sequences = call.q, call.k, call.v, call.visibility.sequences
    if sequences is not None and sequences.q_starts is sequences.k_starts:
        apart = replace(sequences, k_starts=sequences.k_starts.view_as(sequences.k_starts))
        call = call.changed(visibility=replace(call.visibility, sequences=apart))
    if k is not q and v is not q and v is not k:
        return call
    return call.changed(k=k.view_as(k), v=v.view_as(v))


def vmap_of_call(operator: Callable, info: Any, in_dims: Sequence, *arguments: Any):
    """Map in one batch, except where dropout depends on the position in it, or an argument has no batch axis."""
    named = dict(zip(NAMES, arguments, strict=False))
    one_by_one = any(named[name] is not None for name in ("dropout_state", "q_starts", "block_table"))
    return (in_a_loop if one_by_one else in_one_batch)(operator, info.batch_size, in_dims, arguments)


def in_one_batch(operator: Callable, size: int, in_dims: Sequence, arguments: Sequence):
    """Fold the mapped axis into the batch axis, the first of every tensor. A 1-D result stands for None."""
    dims = _tensor_dims(in_dims, arguments)
    batch = arguments[0].shape[0 if dims[0] is None else int(dims[0] == 0)]
    folded = (_fold(x, dim, size, batch) for x, dim in zip(arguments, dims, strict=True))
    outputs = operator(*folded)
    if isinstance(outputs, Tensor):
        return outputs.unflatten(0, (size, batch)), 0
    unfolded = (x if x.dim() == 1 else x.unflatten(0, (size, batch)) for x in outputs)
    return tuple(unfolded), tuple(None if x.dim() == 1 else 0 for x in outputs)


def in_a_loop(operator: Callable, size: int, in_dims: Sequence, arguments: Sequence):
    """Call the operator once for every entry of the mapped axis."""
    dims = _tensor_dims(in_dims, arguments)

    def entry(i: int):
        pairs = zip(arguments, dims, strict=True)
        return operator(*(x if dim is None else x.select(dim, i) for x, dim in pairs))

    outputs = [entry(i) for i in range(size)]
    return tuple(torch.stack(output) for output in zip(*outputs, strict=True)), (0,) * len(outputs[0])


def _tensor_dims(in_dims: Sequence, arguments: Sequence) -> list[int | None]:
    return [dim if isinstance(x, Tensor) else None for x, dim in zip(arguments, in_dims, strict=True)]


def _fold(x: Any, dim: int | None, size: int, batch: int) -> Any:
    """Fold [B or 1, ...] with a mapped axis at `dim`, or without: [size * B, ...]; a shared mask stays."""
    if not isinstance(x, Tensor) or (dim is None and x.shape[0] == 1 != batch):
        return x
    x = x[None] if dim is None else x.movedim(dim, 0)
    return x.expand(size, batch, *x.shape[2:]).flatten(0, 1)
