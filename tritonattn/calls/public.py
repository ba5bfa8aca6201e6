"""The one decorator of the public functions and layers."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F

from ..core.shards import refuse_context_parallel
from .sharded import Axes, call_of_parts
from .words import hint_for

P = ParamSpec("P")
R = TypeVar("R")

_TORCHS_OWN = torch._C._nn.scaled_dot_product_attention  # pyright: ignore[reportAttributeAccessIssue]


def public(
    axes: Mapping[str, Axes] | None = None, paged: Mapping[str, Axes] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: an argument that the function does not take raises a TypeError with a hint; the signature stays.

    axes, paged   the axes of batch and heads in the arguments, and where there is a block table: DTensors then become
                  this rank's parts, and the results DTensors placed as q is; under torch's context_parallel the
                  function raises
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*arguments: P.args, **keywords: P.kwargs) -> R:
            try:
                if axes is not None:
                    if F.scaled_dot_product_attention is not _TORCHS_OWN:
                        refuse_context_parallel(function.__name__)
                    tensors: Any = sys.modules.get("torch.distributed.tensor")
                    if tensors is not None:
                        for value in (*arguments, *keywords.values()):  # no generator: every call asks
                            if type(value) is tensors.DTensor:
                                return call_of_parts(function, signature, axes, paged, arguments, keywords)
                return function(*arguments, **keywords)
            except TypeError:
                hint = hint_for(arguments, keywords, signature.parameters)
                if hint is None:
                    raise
            raise TypeError(f"{function.__qualname__.removesuffix('.__init__')}: {hint}")

        return call

    return decorate
