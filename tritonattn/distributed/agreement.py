"""Arguments that are the same on every rank, compared once for each new signature of a call.

If sizes differ between ranks, torch.distributed aborts or waits. If byte counts are equal, as of [B, S, H, D] and
[B, H, S, D], it raises nothing and the results are wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from numbers import Real
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DebugLevel, get_debug_level  # pyright: ignore[reportPrivateImportUsage]

from ..core.autograd import needs_graph
from ..core.hints import type_of
from ..core.private_names import private
from ..scaling import Scaling
from .layout import Split

FakeTensor = private("torch._subclasses.FakeTensor", ())

_SHOWN = 8  # ranks by number in an error

_compared: WeakKeyDictionary[dist.ProcessGroup, set[tuple[Any, ...]]] = WeakKeyDictionary()


def require_agreement(split: Split, function: str, **arguments: Any) -> None:
    """Raise ValueError on every rank unless all call `function` with arguments of one signature.

    arguments   one of them a tensor

    A tensor's signature is its dtype, its shape, and if it carries a gradient, for which a backward sends messages. A
    scaling's is its class, its settings, and which of its parameters carry one. Anything else is its own, where 1 and
    1.0 are equal.

    Each rank remembers the signatures of a group's calls, and communicates only for a new one. As long as ranks agree,
    it is new on all of them. If it is new on some only, their comparison meets another collective of the others, at
    which torch.distributed raises, or a message of the ring, for which it waits until its timeout. Its debug level
    DETAIL has every call compared. Calls that are traced or captured as a graph are not compared.
    """
    if split.size == 1 or torch.compiler.is_compiling():
        return
    one = next(x for x in arguments.values() if isinstance(x, Tensor))
    if isinstance(one, FakeTensor) or (one.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    known, signature = _compared.setdefault(split.group, set()), (function, *map(_signature, arguments.values()))
    if signature not in known or get_debug_level() == DebugLevel.DETAIL:
        _compare(split, one.device, {"function": function} | {name: _shown(x) for name, x in arguments.items()})
        known.add(signature)


def _signature(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.dtype, x.shape, needs_graph(x)
    if isinstance(x, Scaling):
        return type(x), *_settings(x)
    if isinstance(x, (list, tuple)):
        return tuple(map(_signature, x))
    if isinstance(x, Real) and not isinstance(x, bool):
        x = float(x)
        return int(x) if x.is_integer() else x
    return x if x is None or isinstance(x, (bool, str, torch.dtype)) else type(x)


def _settings(scaling: Scaling) -> Iterator[Any]:
    """The fields of a dataclass, what modules show of themselves, and the names of tensors with a gradient.

    Other attributes of other classes may be a rank's.
    """
    tensors: dict[str, Any] = vars(scaling)
    if isinstance(scaling, nn.Module):
        _, *parts = scaling.modules()
        yield scaling.extra_repr()
        yield from (f"{type(part).__name__}({part.extra_repr()})" for part in parts)
        tensors = dict(scaling.named_parameters())
    elif is_dataclass(scaling):
        yield from (_signature(getattr(scaling, field.name)) for field in fields(scaling))
    yield from (f"{name} with a gradient" for name, x in tensors.items() if isinstance(x, Tensor) and needs_graph(x))


def _shown(x: Any) -> str:
    if isinstance(x, Tensor):
        return type_of(x) + (" with a gradient" if needs_graph(x) else "")
    return f"{type(x).__name__}({', '.join(map(str, _settings(x)))})" if isinstance(x, Scaling) else repr(_signature(x))


def _compare(split: Split, device: torch.device, shown: dict[str, str]) -> None:
    ranks: list[Any] = [None] * split.size
    with torch.cuda.device(device if device.type == "cuda" else -1):  # objects travel by the current one
        dist.all_gather_object(ranks, shown, group=split.group)
    for name in shown:
        values = [rank.get(name) for rank in ranks]
        if len(set(values)) > 1:
            got = " and ".join(f"{value} on {_listed(values, value)}" for value in dict.fromkeys(values))
            raise ValueError(f"{name}: expected the same on every rank of the mesh, got {got}")


def _listed(values: list[Any], value: Any) -> str:
    numbers = [str(rank) for rank, one in enumerate(values) if one == value]
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(numbers[:_SHOWN])}{more}"
