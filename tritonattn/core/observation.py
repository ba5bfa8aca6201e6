"""Whoever wants to see what attention is computed from: told of every call, changing none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .autograd import is_transformed


@dataclass(frozen=True, eq=False)
class ObservedCall:
    """One computed attention.

    q            [B, Hq, Sq, D], in the graph that backward walks; packed sequences are [1, Hq, T, D]
    k            [B, Hkv, Sk, D], likewise
    out          [B, Hq, Sq, Dv], as the caller gets it, after dropout
    visibility   which keys each row sees, a `tritonattn.core.visibility.Visibility`
    softcap      or None
    aux          computes the call's `AttentionAux` in a pass of its own, without dropout and without a graph
    """

    q: Tensor
    k: Tensor
    out: Tensor
    visibility: Any
    softcap: float | None
    aux: Callable[[], Any]


_observers: tuple[Callable[[ObservedCall], None], ...] = ()


@contextmanager
def observing(observer: Callable[[ObservedCall], None]) -> Iterator[None]:
    """Call observer after every attention of the process while the context lasts.

    Calls inside torch.compile, under torch.func and of `attention_decode` are not seen.
    """
    global _observers
    _observers = (*_observers, observer)
    try:
        yield
    finally:
        _observers = tuple(other for other in _observers if other is not observer)


@contextmanager
def unobserved() -> Iterator[None]:
    """Nobody is told while the context lasts."""
    global _observers
    before, _observers = _observers, ()
    try:
        yield
    finally:
        _observers = before


def is_observed() -> bool:
    """Whether somebody wants to see a call made now. A compiler reads no state here."""
    return not torch.compiler.is_compiling() and bool(_observers) and not is_transformed()


def tell(call: ObservedCall) -> None:
    """Show a call to all observers."""
    observers = _observers
    with torch.no_grad(), unobserved():
        for observer in observers:
            observer(call)
