"""The "triton" backend as the choice and operators see it, without an import of triton, which may be missing."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from ..core.autograd import needs_graph
from ..core.call import AttentionCall, ForwardResult, Request, RowGradients
from ..core.terms import Gradients, Needs
from .cpu import Sdpa
from .protocol import Backend, SecondOrder

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_LARGEST_DIM = 512
_LARGEST_KEY_OF_DECODE = 1024
_DIM_OF_EVERY_GPU = 256


@functools.cache
def kernels() -> Any:
    """The passes of the backend, imported at first use."""
    from . import triton

    return triton


class Kernels(Backend):
    """Kernels of this package, on a GPU or in Triton's interpreter."""

    name, instead, reads_pages, statistics = "triton", "backends 'sdpa' and 'reference' do", True, True

    def obstacle(self, request: Request) -> str | None:
        visible = request.visibility
        decodes = request.cached != "" and visible.sequences is None and not visible.invariant
        return obstacle_of(request.q, request.v, decodes)

    def require(self, request: Request) -> None:
        device = request.q.device
        if not _HAS_TRITON:
            raise ImportError(
                "backend: 'triton' needs the package triton, which is not installed: pip install \"triton>=3.4\""
                " (Linux) or triton-windows; backends 'sdpa' and 'reference' do without"
            )
        if device.type == "cuda":
            return
        from .triton.launch import runs_on  # `kernels` is cached by a wrapper that torch.compile warns of

        if not runs_on(device):
            raise ValueError(
                f"backend: expected tensors on a CUDA or HIP device for 'triton', got {device}; kernels run on CPU"
                " tensors only in triton's interpreter, with TRITON_INTERPRET=1 in the environment"
            )

    def passed_over(self, request: Request) -> str | None:
        return self.obstacle(request) or (None if _HAS_TRITON else "triton is not installed")

    def refuse_terms(self, call: AttentionCall) -> None:
        terms = call.terms
        is_scaled = terms.query_scale is not None or terms.key_scale is not None
        is_asked = call.v.dtype == torch.float16 and is_scaled
        if is_asked and needs_graph(*call.tensors()[:5]):  # not of key_bias and sinks
            raise NotImplementedError(
                "batch_invariant: not supported with gradients of float16 through a scaling with vectors: kernels"
                " divide these by a head's largest entry before they round; use bfloat16 or float32"
            )

    def forward(self, call: AttentionCall, rounding: Tensor | None, has_graph: bool) -> ForwardResult:
        passes, visible = kernels(), call.visibility
        if not visible.invariant:  # such a call splits no keys, and its loop is that of other calls
            is_cache = call.cached and visible.sequences is None
            if is_cache or not (has_graph or not passes.are_few_rows(call)):
                return passes.decode(call, call.aux)
        return passes.forward(call, call.aux, rounding)

    def backward(
        self,
        call: AttentionCall,
        saved: tuple[Tensor, Tensor, Tensor | None],
        d_out: Tensor,
        d_rows: RowGradients,
        needs: Needs,
    ) -> Gradients:
        out, lse, rounding = saved
        return kernels().backward(call, out, lse, d_out, d_rows, needs, rounding)

    def tangent(
        self, call: AttentionCall, saved: tuple[Tensor, Tensor, Tensor | None], tangents: Gradients
    ) -> tuple[Tensor, Tensor]:
        passes = kernels() if takes_derivatives(call) else Sdpa()
        return passes.tangent(call, saved, tangents)

    def second(
        self, call: AttentionCall, saved: tuple[Tensor, Tensor, Tensor | None], asked: SecondOrder
    ) -> tuple[Gradients, Gradients, tuple[Tensor, Tensor] | None]:
        passes = kernels() if takes_derivatives(call) else Sdpa()
        return passes.second(call, saved, asked)


def takes_derivatives(call: AttentionCall) -> bool:
    """True where the kernels compute tangents and their gradients: up to head dim 256, in fp32 128.

    Tiles in torch compute others: of wider heads the sums spill, and pass the shared memory of some cards. So they do
    with a relative scale.
    """
    return call.terms.relative_scale is None and max(call.q.shape[3], call.v.shape[3]) * call.v.dtype.itemsize <= 512


def kernels_take(x: Tensor) -> bool:
    """True where "auto" runs kernels on x [B, H, S, D]."""
    return x.device.type == "cuda" and _HAS_TRITON and obstacle_of(x, x) is None


def obstacle_of(q: Tensor, v: Tensor, decodes: bool = False) -> str | None:
    """Name the property of operands that kernels cannot honour, or None; the decode kernel takes wider keys."""
    if q.dtype == torch.float64:
        return "q of dtype torch.float64"
    if q.device.type == "cuda" and _HAS_TRITON and (obstacle := _obstacle_of_card(q.device)):
        return obstacle
    head_dim, value_dim = q.shape[3], v.shape[3]
    if head_dim <= _DIM_OF_EVERY_GPU and value_dim <= _DIM_OF_EVERY_GPU:
        return None
    largest_key = _LARGEST_KEY_OF_DECODE if decodes else _LARGEST_DIM
    for dim, limit in ((head_dim, largest_key), (value_dim, _LARGEST_DIM)):
        if dim > limit:
            return f"head_dim {dim}, above {limit}"
    if q.device.type == "cuda" and _HAS_TRITON:
        return _obstacle_of_memory(head_dim, value_dim, q.dtype, q.device, decodes)
    return None


def _obstacle_of_card(device: torch.device) -> str | None:
    """Say that Triton has no code for a device's tensor cores, or None."""
    return _kept_obstacle_of_card(device)


@functools.cache
def _kept_obstacle_of_card(device: torch.device) -> str | None:
    from ..tuning.config import Target

    if not torch.cuda.is_available():  # tensors of a trace
        return None
    target = Target.of(device)
    return f"{target.name}, for whose tensor cores Triton has no code," if target.is_too_old else None


def _obstacle_of_memory(
    head_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device, decodes: bool
) -> str | None:
    """Name what a device lacks for the kernels at wide heads, or None."""
    from ..tuning.config import FIRST_KERNELS, Target
    from ..tuning.defaults import obstacle

    return obstacle(head_dim, value_dim, dtype, Target.of(device), ("decode",) if decodes else FIRST_KERNELS)


# The mark of torch.compiler.assume_constant_result, which imports all of torch._dynamo, in a second.
_obstacle_of_card._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
_obstacle_of_memory._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
