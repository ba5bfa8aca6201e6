"""The protocol that the choice of a backend and a call ask of each backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core.call import AttentionCall, ForwardResult, Request, RowGradients
from ..core.terms import Gradients, Needs

Attend = Callable[[AttentionCall], ForwardResult]


class SecondOrder(NamedTuple):
    """The gradients of a tangent that are asked for, and what they are made of.

    tangents         of the call's tensors, as `Backend.tangent` has them
    d_out, d_lse     gradients of the tangents of out, in its dtype, and of lse, or None; any strides
    needs            the tensors whose gradients are asked for
    needs_tangents   the tangents, likewise; one that is None may have a gradient
    is_along         the tangents of out and lse are asked for too
    """

    tangents: Gradients
    d_out: Tensor
    d_lse: Tensor | None
    needs: Needs
    needs_tangents: Needs
    is_along: bool = False


class Backend:
    """A way to compute attention: a subclass in a folder, and a row of `BACKENDS`.

    `forward` and `backward` compute a call, or `attention` does with gradients of its own; `tangent` and `second` its
    derivatives beyond the first.

    name          the argument `backend`, and `AttentionCall.backend`
    instead       which others honour what it refuses, in errors
    by_formulas   it takes the dense formulas of a scaling, which torch differentiates, in place of its scales
    is_traced     False: torch.compile leaves a call to Python
    reads_pages   `forward` takes keys in pages
    statistics    True: kernels compute the statistics of keys, and add gradients of q and k before they are rounded;
                  None: where they run; False: torch does
    attention     the results of a call, with gradients, or None where it is for `forward` and `backward`; its other
                  argument runs a call by these
    """

    name: ClassVar[str]
    instead: ClassVar[str] = ""
    by_formulas: ClassVar[bool] = False
    is_traced: ClassVar[bool] = True
    reads_pages: ClassVar[bool] = False
    statistics: ClassVar[bool | None] = False
    attention: ClassVar[Callable[[AttentionCall, Attend], ForwardResult | None]] | None = None

    def obstacle(self, request: Request) -> str | None:
        """Name what it cannot honour wherever it runs, or None."""
        return None

    def require(self, request: Request) -> None:
        """Raise where the packages and the device at hand cannot run a request that asks for it by name."""

    def passed_over(self, request: Request) -> str | None:
        """Say why "auto" goes on to the next backend, "" where nobody need know; None where it takes a request."""
        return self.obstacle(request)

    def follows_lengths(self, device: torch.device) -> str | None:
        """Say what makes a row's bits depend on the rest of the batch, though batch_invariant is on; None: nothing."""
        return None

    def refuse_terms(self, call: AttentionCall) -> None:
        """Raise for terms of a scaling whose gradients would depend on the batch, under batch_invariant."""

    def forward(self, call: AttentionCall, rounding: Tensor | None, has_graph: bool) -> ForwardResult:
        """Compute the output and lse of a call, and with aux its max_logit and entropy.

        rounding    int8 and shaped like the output: takes what the output lost when it was rounded (`core.rounding`)
        has_graph   a backward comes, whose tiles must multiply alike
        """
        raise NotImplementedError

    def backward(
        self,
        call: AttentionCall,
        saved: tuple[Tensor, Tensor, Tensor | None],
        d_out: Tensor,
        d_rows: RowGradients,
        needs: Needs,
    ) -> Gradients:
        """Compute the gradients that `needs` asks for; saved: out, lse and rounding of `forward`.

        d_rows.max_logit is None: `ops.largest` gives what comes of it.
        """
        raise NotImplementedError

    def tangent(
        self,
        call: AttentionCall,
        saved: tuple[Tensor, Tensor, Tensor | None],
        tangents: Gradients,
    ) -> tuple[Tensor, Tensor]:
        """Compute the tangents of out, in v's dtype, and of lse, in lse's; saved as `backward` has it.

        tangents    of the call's tensors, each of its tensor's shape and dtype; None stands for zero
        """
        raise NotImplementedError

    def second(
        self,
        call: AttentionCall,
        saved: tuple[Tensor, Tensor, Tensor | None],
        asked: SecondOrder,
    ) -> tuple[Gradients, Gradients, tuple[Tensor, Tensor] | None]:
        """Compute the gradients of `tangent` towards the call's tensors, and towards their tangents; and its results.

        All dependence on the call's tensors counts, that of out and lse too.
        """
        raise NotImplementedError
