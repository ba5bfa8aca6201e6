"""Observers of attention: each is handed the calls of threads in which it has begun, and changes none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .autograd import is_transformed
from .call import Request
from .visibility import Visibility


class ObservedRows(NamedTuple):
    """The softmax of each row before dropout and sinks, [B, Hq, Sq], fp32 (fp64 for fp64 q); as `AttentionAux`, but

    max_logit         without biases, which may grow with the position: it tells how large q . k is
    max_probability   the largest, with biases; NaN for a row without keys
    """

    max_logit: Tensor
    max_probability: Tensor
    entropy: Tensor


@dataclass(frozen=True, eq=False)
class ObservedCall:
    """One computed attention.

    q         [B, Hq, Sq, D], in the graph of the backward; packed sequences are [1, Hq, T, D]
    k         [B, Hkv, Sk, D], likewise
    out       [B, Hq, Sq, Dv], as the caller gets it, after dropout
    request   what was asked, checked
    rows      computes the softmax of the rows in another pass, without a graph
    """

    q: Tensor
    k: Tensor
    out: Tensor
    request: Request
    rows: Callable[[], ObservedRows]

    @property
    def visibility(self) -> Visibility:
        return self.request.visibility


class Observer:
    """Hand calls of attention to a function, in each thread (or context) between `begin` and `end`.

    After `close` it gets no call of any thread. Calls inside torch.compile, under torch.func and over a KV cache
    (`attention_decode`, `attention_varlen` with a block table) are not handed on, nor are calls by the function.
    """

    def __init__(self, function: Callable[[ObservedCall], None]) -> None:
        self.function = function
        self.closed = False

    def begin(self) -> None:
        observers.set((*_open_observers(), self))

    def end(self) -> None:
        observers.set(tuple(other for other in _open_observers() if other is not self))

    def close(self) -> None:
        self.closed = True
        self.end()


observers: ContextVar[tuple[Observer, ...]] = ContextVar("tritonattn_observers", default=())


def _open_observers() -> tuple[Observer, ...]:
    return tuple(observer for observer in observers.get() if not observer.closed)


def is_observed() -> bool:
    """True where a call made now has an observer. A compiler reads no state here."""
    return not torch.compiler.is_compiling() and bool(_open_observers()) and not is_transformed()


@contextmanager
def unobserved() -> Iterator[None]:
    """Hand the calls inside to no observer."""
    token = observers.set(())
    try:
        yield
    finally:
        observers.reset(token)


def notify_observers(call: ObservedCall) -> None:
    """Hand a call to every observer of this thread."""
    found = _open_observers()
    with unobserved(), torch.no_grad():
        for observer in found:
            observer.function(call)
