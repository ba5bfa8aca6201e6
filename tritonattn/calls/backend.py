"""Which backend runs a call."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor

from .checks import Options

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_LARGEST_KERNEL_DIM = 256


def choose_backend(q: Tensor, k: Tensor, v: Tensor, options: Options) -> str:
    """The backend that runs the call: the one asked for, which must be able to, or one that can."""
    asked = options.backend
    if asked == "triton" and (obstacle := _kernel_obstacle(q, v)):
        raise NotImplementedError(
            f"{obstacle}: backend 'triton' does not support it; backends 'sdpa' and 'reference' do"
        )
    if q.numel() == 0 or k.numel() == 0:
        return "sdpa"  # nothing to compute
    if asked in ("sdpa", "reference"):
        return asked
    if asked == "auto":
        if q.device.type != "cuda":
            return "sdpa"
        if obstacle := _kernel_obstacle(q, v) or (not _HAS_TRITON and "triton is not installed"):
            _warn_once(f"tritonattn: backend 'sdpa' instead of 'triton': {obstacle}")
            return "sdpa"
        return "triton"
    if not _HAS_TRITON:
        raise ImportError(
            "backend: 'triton' needs the package triton, which is not installed: pip install 'triton>=3.4'"
            " (Linux); backends 'sdpa' and 'reference' do without"
        )
    _check_kernels_run_on(q.device)
    return "triton"


def kernels_take(x: Tensor) -> bool:
    """Whether "auto" runs kernels on x [B, H, S, D]."""
    return x.device.type == "cuda" and _HAS_TRITON and _kernel_obstacle(x, x) is None


def _kernel_obstacle(q: Tensor, v: Tensor) -> str | None:
    """What kernels cannot honour."""
    if q.dtype == torch.float64:
        return "q of dtype torch.float64"
    if max(q.shape[3], v.shape[3]) > _LARGEST_KERNEL_DIM:
        return f"head_dim {max(q.shape[3], v.shape[3])}, above {_LARGEST_KERNEL_DIM}"
    return None


def _check_kernels_run_on(device: torch.device) -> None:
    if device.type == "cuda":
        return
    from ..backends.triton import launch

    if not launch.runs_on(device):
        raise ValueError(
            f"backend: 'triton' expects tensors on a CUDA or HIP device, got {device}; kernels run on CPU"
            " tensors only in triton's interpreter, with TRITON_INTERPRET=1 in the environment"
        )


def _warn_once(message: str) -> None:
    if not torch.compiler.is_compiling():
        _warn(message)


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=6)
