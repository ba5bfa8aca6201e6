"""The backends, and the choice between them."""

from __future__ import annotations

import torch

from ..core.call import Request
from ..core.hints import warn_once
from .by_kernels import Kernels
from .cpu import Sdpa
from .flash import Flash
from .protocol import Backend
from .reference import Reference

BACKENDS: dict[str, Backend] = {one.name: one for one in (Flash(), Kernels(), Sdpa(), Reference())}

# By the device's type, which backends "auto" asks, one after the other; elsewhere the last of them alone.
_AUTO = {"cuda": ("flash", "triton", "sdpa")}
_ANYWHERE = "sdpa"


def choose(request: Request) -> Backend:
    """Choose the backend of a request: the one asked for, which must support it, or for "auto" one that does."""
    q, asked = request.q, request.backend
    sequences = request.visibility.sequences
    is_empty = q.numel() == 0 or request.k.numel() == 0 or (sequences is not None and sequences.q_starts.shape[0] == 1)
    if asked == "auto":
        chosen = BACKENDS[_ANYWHERE] if is_empty or q.device.type not in _AUTO else _automatic(request)
    else:
        chosen = BACKENDS[asked]
        if (obstacle := chosen.obstacle(request)) is not None:
            raise NotImplementedError(f"{obstacle}: backend {asked!r} does not support it; {chosen.instead}")
        if is_empty:
            chosen = BACKENDS[_ANYWHERE]
        else:
            chosen.require(request)
    if request.visibility.invariant:
        _refuse_dependence(request, chosen)
    return chosen


def _automatic(request: Request) -> Backend:
    why = ""
    *others, last = _AUTO[request.q.device.type]
    for name in others:
        reason = BACKENDS[name].passed_over(request)
        if reason is None:
            return BACKENDS[name]
        why = why or (reason and f"instead of {name!r}: {reason}")
    if why and not torch.compiler.is_compiling():
        warn_once(f"tritonattn: backend {last!r} {why}")
    return BACKENDS[last]


def _refuse_dependence(request: Request, chosen: Backend) -> None:
    """Raise where a row's bits would depend on the rest of the batch although `batch_invariant` is on."""
    obstacle = chosen.follows_lengths(request.q.device)
    if request.dropout_p > 0:
        obstacle = "dropout_p above 0, whose bits follow the position in the batch"
    if obstacle is not None:
        raise NotImplementedError(f"batch_invariant: not supported with {obstacle}")
