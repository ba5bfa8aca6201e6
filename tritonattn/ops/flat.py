"""An attention call as the arguments of an operator, and back. The record itself says which arguments there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args, get_type_hints

from torch import Tensor
from torch.autograd.function import Function

from ..core.call import AttentionCall, Gradients, Logits
from ..core.dropout import Dropout
from ..core.sequences import Sequences
from ..core.visibility import Visibility
from .schema import SCHEMA_TYPES

_RECORDS = (Visibility, Logits, Dropout, Sequences)
# Parts that are no arguments: sizes, which tensors have, and what has done its work before a backend is called.
_SIZES = ("batch", "q_heads", "kv_heads", "q_len")
_NO_ARGUMENTS = {("visibility", name) for name in (*_SIZES, "counted")}
_NO_ARGUMENTS |= {("gain",), ("dropout_p",), ("wide_q",), ("wide_k",)}


@dataclass(frozen=True)  # Dynamo of torch 2.8 takes no property of a NamedTuple
class Argument:
    """A leaf of the record, by its path and type: one of its types, where it can have several.

    The type has None too where a record on the path may be missing.
    """

    path: tuple[str, ...]
    kind: Any
    name: str

    @property
    def is_tensor(self) -> bool:
        return Tensor in (self.kind, *get_args(self.kind))

    def of(self, call: AttentionCall) -> Any:
        value: Any = call
        for name in self.path:
            value = None if value is None else getattr(value, name)
        return None if self.is_tensor and not isinstance(value, Tensor) else value


def _leaves(record: type, path: tuple[str, ...] = (), optional: bool = False) -> Iterator[Argument]:
    for field, kind in get_type_hints(record).items():
        own, parts = (*path, field), get_args(kind) or (kind,)
        inner = next((part for part in parts if part in _RECORDS), None)
        if own in _NO_ARGUMENTS:
            continue
        if inner is not None:
            yield from _leaves(inner, own, optional or type(None) in parts)
        elif kind in SCHEMA_TYPES:
            yield Argument(own, kind | None if optional else kind, "_".join(own) if own[0] == "dropout" else field)


def _rank(argument: Argument) -> tuple[int, bool]:
    """Those that can have a gradient come first, in the order of `Gradients`, then other tensors."""
    fields = Gradients._fields
    return fields.index(argument.name) if argument.name in fields else len(fields), not argument.is_tensor


ARGUMENTS = tuple(sorted(_leaves(AttentionCall), key=_rank))
NAMES = tuple(argument.name for argument in ARGUMENTS)
GRADIENTS = len(Gradients._fields)
TENSORS = sum(argument.is_tensor for argument in ARGUMENTS)


def flat(call: AttentionCall) -> list[Any]:
    """The arguments of a call."""
    return [argument.of(call) for argument in ARGUMENTS]


def call_of(values: Sequence[Any]) -> AttentionCall:
    """The call of these arguments."""
    tree: dict[str, Any] = {}
    for argument, value in zip(ARGUMENTS, values, strict=True):
        node = tree
        for name in argument.path[:-1]:
            node = node.setdefault(name, {})
        node[argument.path[-1]] = value
    visible, q, k = tree["visibility"], tree["q"], tree["k"]
    visible["sequences"] = _record(Sequences, visible["sequences"])
    sizes = zip(_SIZES, (q.shape[0], q.shape[1], k.shape[1], q.shape[2]), strict=True)
    tree["visibility"] = Visibility(**dict(sizes), device=q.device, **visible)
    tree["logits"], tree["dropout"] = Logits(**tree["logits"]), _record(Dropout, tree["dropout"])
    return AttentionCall(**tree)


def _record(kind: Any, fields: dict[str, Any]) -> Any:
    """The record of these fields, or None where all are missing."""
    return None if all(value is None for value in fields.values()) else kind(**fields)


def with_values(call: AttentionCall) -> AttentionCall:
    """The call with q and k in fp32 where their gradients are: what stands for them in the graph has no values."""
    if call.wide_q is None and call.wide_k is None:
        return call
    q = call.q if call.wide_q is None else _Widened.apply(call.q.detach(), call.wide_q)
    k = call.k if call.wide_k is None else _Widened.apply(call.k.detach(), call.wide_k)
    return replace(call, q=q, k=k, wide_q=None, wide_k=None)


class _Widened(Function):
    """x in fp32, whose gradient goes to another tensor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, wide):
        return x.float()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, g):
        return None, g


def without_repeats(call: AttentionCall) -> AttentionCall:
    """The call without a tensor that is two arguments: torch.compile refuses those in an autograd function."""
    q, k, v, sequences = call.q, call.k, call.v, call.visibility.sequences
    if sequences is not None and sequences.q_starts is sequences.k_starts:
        apart = replace(sequences, k_starts=sequences.k_starts.view_as(sequences.k_starts))
        call = replace(call, visibility=replace(call.visibility, sequences=apart))
    if k is not q and v is not q and v is not k:
        return call
    return replace(call, k=k.view_as(k), v=v.view_as(v))
