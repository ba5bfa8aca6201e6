"""DTensors as arguments of the public functions: each rank computes its batch entries and heads as plain tensors.

The operators have sharding rules (`distributed/operators.py`), which alone do not make these functions take DTensors:
scalings compute with the keys around them by operators that DTensor does not shard, and plain arguments with DTensors
are refused.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from ..core.dropout import stream
from ..core.row_terms import as_marked
from ..core.terms import TERMS, Term
from ..core.torch_distributed import is_dtensor, twin

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Axes(NamedTuple):
    """The axes of batch and heads in an argument; None where it has none.

    Negative ones count from the right, of an argument that broadcasts: it may lack them, or have 1 there.
    """

    batch: int | None
    heads: int | None

    def of(self, x: Tensor, meaning: str | None) -> int | None:
        """The axis of "batch" or "heads" in x, None if each value there serves all."""
        axis = None if meaning is None else getattr(self, meaning)
        if axis is None or axis >= 0:
            return axis
        return x.ndim + axis if x.ndim >= -axis and x.shape[axis] > 1 else None


class OfSinks(Axes):
    """The axes of sinks: [B, Hq, Sq], or [Hq]."""

    def of(self, x: Tensor, meaning: str | None) -> int | None:
        if x.ndim > 1:
            return super().of(x, meaning)
        return 0 if meaning == "heads" else None


def _axes_of(term: Term) -> Axes:
    """The axes of a tensor as users give it."""
    count = sum(axis != "G" for axis in term.axes)
    return (OfSinks if term.enters == "sink" else Axes)(-count, 1 - count)


ROWS, OPERAND, NOWHERE = Axes(-3, -2), Axes(0, 1), Axes(None, None)
BATCHED = {
    **dict.fromkeys(("q", "k", "v"), OPERAND),
    **dict.fromkeys(("scaling", "gain"), ROWS),
    **{term.name: _axes_of(term) for term in TERMS if term.axes},
    **dict.fromkeys(("key_lengths", "key_ranges"), Axes(0, None)),
    "mask": Axes(-4, -3),
    "aux": OPERAND,
}
PACKED = {
    **dict.fromkeys(("q", "k", "v"), Axes(None, 1)),
    **dict.fromkeys(("scaling", "gain"), Axes(None, -2)),
    **{term.name: BATCHED[term.name]._replace(batch=None) for term in TERMS if term.axes},
    "aux": Axes(None, 0),
}
CACHED = {
    **BATCHED,
    **dict.fromkeys(("k_cache", "v_cache"), OPERAND),
    **dict.fromkeys(("block_table", "query_lengths"), Axes(0, None)),
    **dict.fromkeys(("k_descale", "v_descale"), Axes(-2, -1)),
}
CACHED_PAGES = {**CACHED, **dict.fromkeys(("k_cache", "v_cache"), Axes(None, 2))}
PACKED_PAGES = {
    **PACKED,
    **dict.fromkeys(("k", "v"), Axes(None, 2)),
    **dict.fromkeys(("k_descale", "v_descale"), Axes(None, -1)),
}
_OPERANDS, _BY_HEAD = ("k", "v", "k_cache", "v_cache"), Axes(None, 0)


def call_of_parts(
    function: Callable[..., Any],
    signature: inspect.Signature,
    axes: Mapping[str, Axes],
    paged: Mapping[str, Axes] | None,
    arguments: Iterable[Any],
    keywords: Mapping[str, Any],
) -> Any:
    """Call a function of DTensors on this rank's parts; its results are DTensors placed as q is.

    axes, paged   the axes of the arguments, and where there is a block table

    With a plain q a DTensor that has a value per head stands for this rank's part, as parameters do in tensor
    parallelism.
    """
    given = signature.bind(*arguments, **keywords).arguments
    if paged is not None and given.get("block_table") is not None:
        axes = paged
    if not is_dtensor(given["q"]):
        return function(**{name: _part_with(given["q"], name, x, axes) for name, x in given.items()})
    shards = Shards.of(given, axes)
    with stream(shards.number):
        result = function(**{name: shards.part(name, x) for name, x in given.items()})
    if not isinstance(result, tuple):
        return shards.wrapped(result, axes["q"])
    out, aux = result
    of_rows = (x if x is None else shards.wrapped(x, axes["aux"]) for x in aux)
    return shards.wrapped(out, axes["q"]), type(aux)(*of_rows)


def head_parts(q: Tensor, **values: Any) -> list[Any]:
    """This rank's parts of values that may have one per head, arguments of `BATCHED`, with its q [B, Hq, Sq, D]."""
    if is_dtensor(q):
        return list(values.values())
    return [_part_with(q, name, x, BATCHED) for name, x in values.items()]


def _part_with(q: Tensor, name: str, x: Any, axes: Mapping[str, Axes]) -> Any:
    """The part of an argument that goes with a plain q of this rank's heads."""
    if not is_dtensor(x):
        return x
    of_name, heads = axes.get(name, NOWHERE), axes["q"].heads
    if name in _OPERANDS or of_name.heads is None or heads is None:
        raise TypeError(f"{name}: expected a plain tensor with a plain q, got a DTensor placed {_placed(x)}")
    axis, part = of_name.of(x, "heads"), x.to_local()
    if axis is not None and part.shape[axis] != q.shape[heads]:
        got = f"{part.shape[axis]} of {x.shape[axis]}, placed {_placed(x)}"
        raise ValueError(f"{name}: expected a value for each of q's {q.shape[heads]} heads on this rank, got {got}")
    return as_marked(part, x)


class Shards(NamedTuple):
    """The way in which q is spread over a mesh.

    meanings   for every dimension of the mesh "batch", "heads", or None where ranks hold the same
    heads      Hq of all ranks
    """

    mesh: DeviceMesh
    placements: tuple[Any, ...]
    meanings: tuple[str | None, ...]
    heads: int
    axes: Mapping[str, Axes]

    @classmethod
    def of(cls, given: Mapping[str, Any], axes: Mapping[str, Axes]) -> Shards:
        """Raise TypeError or ValueError unless q's batch and heads alone are sharded, and keys and values as q's."""
        q, meanings = given["q"], []
        axis_of = axes["q"]._asdict().items()
        sharded = {meaning: _tensors().Shard(axis) for meaning, axis in axis_of if axis is not None}
        for placement in q.placements:
            meaning = next((m for m, shard in sharded.items() if placement == shard), None)
            if meaning is None and not placement.is_replicate():
                rest = "a sharded sequence is for tritonattn.distributed.context_parallel_attention"
                raise ValueError(f"q: expected its batch or heads sharded, or replicas, got {_placed(q)}; {rest}")
            meanings.append(meaning)
        shards = cls(q.device_mesh, tuple(q.placements), tuple(meanings), q.shape[axes["q"].heads], axes)
        for name in ("q", *_OPERANDS):
            if name in given:
                shards._check(name, given[name])
        return shards

    def _check(self, name: str, x: Any) -> None:
        if not is_dtensor(x):
            raise TypeError(f"{name}: expected a DTensor, as q is, got a {type(x).__name__}")
        wanted, _ = self._wanted(x, self.axes[name])
        if x.device_mesh != self.mesh or tuple(x.placements) != wanted:
            raise ValueError(f"{name}: expected q's mesh, and {_listed(wanted)} there, got {_placed(x)}")
        for meaning in ("batch", "heads"):
            ranks = math.prod(self.mesh.size(i) for i, one in enumerate(self.meanings) if one == meaning)
            axis = getattr(self.axes[name], meaning)
            if axis is not None and x.shape[axis] % ranks:
                raise ValueError(f"{name}: axis {axis}: expected a size that {ranks} ranks divide, got {x.shape[axis]}")

    @property
    def number(self) -> int:
        """The number of this rank's part of q, the same on ranks that hold the same."""
        number = 0
        for i, meaning in enumerate(self.meanings):
            if meaning is not None:
                number = number * self.mesh.size(i) + self.mesh.get_local_rank(i)
        return number

    def part(self, name: str, x: Any) -> Any:
        """This rank's part of an argument: a DTensor, or a tensor or a module that all ranks hold alike."""
        if isinstance(x, nn.Module):  # a scaling: the first axis of a parameter is that of heads, if as long
            return twin(x, lambda one: self._tensor(one, _BY_HEAD if one.shape[:1] == (self.heads,) else NOWHERE))
        return as_marked(self._tensor(x, self.axes.get(name, NOWHERE)), x) if isinstance(x, Tensor) else x

    def _wanted(self, x: Tensor, axes: Axes) -> tuple[tuple[Any, ...], list[Any]]:
        """The placements of x that q's parts need, and those of its gradient, of which each replica has a summand."""
        tensors, placements, gradients = _tensors(), [], []
        for meaning in self.meanings:
            axis = axes.of(x, meaning)
            placements.append(tensors.Replicate() if axis is None else tensors.Shard(axis))
            gradients.append(tensors.Partial() if axis is None and meaning is not None else placements[-1])
        return tuple(placements), gradients

    def _tensor(self, x: Any, axes: Axes) -> Tensor:
        placements, gradients = self._wanted(x, axes)
        if not is_dtensor(x):
            replicas = [_tensors().Replicate()] * self.mesh.ndim
            x = _tensors().DTensor.from_local(x, self.mesh, replicas, run_check=False)
        return x.redistribute(self.mesh, placements).to_local(grad_placements=gradients)

    def wrapped(self, x: Tensor, axes: Axes) -> Tensor:
        """A result on this rank as a DTensor."""
        return _tensors().DTensor.from_local(x, self.mesh, self._wanted(x, axes)[0], run_check=False)


def _tensors() -> Any:
    """The module of DTensors, which a DTensor has imported."""
    return sys.modules["torch.distributed.tensor"]


def _placed(x: Any) -> str:
    return f"{_listed(x.placements)} on a mesh of {tuple(x.device_mesh.shape)}"


def _listed(placements: Any) -> str:
    return f"({', '.join(map(str, placements))})"
