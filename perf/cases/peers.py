"""Other implementations of attention, each through its public API.

A function of PEERS makes a peer for a case, or raises Unavailable with the reason. The peer takes q, k, v
[B, H, S, D] and returns out, with gradients through everything that the scaling uses.

Peers that take no scaling get q multiplied before (perf/cases/recipes.py), which rounds it. `Peer.rounding` names
such extra roundings, and perf/cases/check.py holds the peer to an eager computation with the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import tritonattn
from tritonattn.backends.triton.launch import configured
from tritonattn.tuning import config
from tritonattn.tuning.defaults import gluon_config

from .contest import Unavailable
from .recipes import factor, prescaled, rows_of
from .work import Shape

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# fp32 logits of all heads that an eager forward holds at once, without and with tensors saved for its backward.
_EAGER_COPIES = {False: 4, True: 12}


@dataclass(frozen=True)
class Problem:
    """A case for a peer: shapes, operands' dtype, device, whether it has a backward, the scaling."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device
    backward: bool
    scaling: str


@dataclass(frozen=True)
class Peer:
    """An implementation: `build` makes the call for a problem; `rounding` is one of check.ROUNDINGS."""

    build: Callable[[Problem], Attend]
    rounding: str
    about: str


def available_memory(device: torch.device) -> int:
    """Count the bytes that can be allocated, after torch's allocator has given back freed tensors."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])


def package(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise Unavailable(f"{name} is not installed: {error}") from error


def require_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Unavailable(f"runs on a GPU, not on device {device.type}")


def require_16_bits(dtype: torch.dtype) -> None:
    if dtype not in (torch.float16, torch.bfloat16):
        raise Unavailable(f"takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}")


def _square(problem: Problem) -> None:
    """Refuse causal problems unless Sq = Sk, since PyTorch's is_causal is top-left."""
    if problem.shape.causal and problem.shape.q_len != problem.shape.k_len:
        raise Unavailable("is_causal is another mask unless there are as many queries as keys")


def _fits_eager(problem: Problem) -> None:
    """Refuse a problem that would take more memory than is free."""
    needed = 4 * problem.shape.logits * _EAGER_COPIES[problem.backward]
    free = available_memory(problem.device)
    if needed > 0.8 * free:
        raise Unavailable(f"would take about {needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB that are free")


def _sdpa(backend: SDPBackend | None) -> Callable[[Problem], Attend]:
    """Build F.scaled_dot_product_attention with a backend, or with the one that it chooses."""

    def build(problem: Problem) -> Attend:
        _square(problem)
        if backend == SDPBackend.MATH:
            _fits_eager(problem)
        elif backend is not None:
            require_gpu(problem.device)
        shape, scaling = problem.shape, problem.scaling
        grouped = shape.heads != shape.kv_heads

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, scale = prescaled(scaling, q, k, shape.causal)
            return scaled_dot_product_attention(q, k, v, is_causal=shape.causal, scale=scale, enable_gqa=grouped)

        def attend_with_backend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return attend(q, k, v)

        return attend if backend is None else attend_with_backend

    return build


def _flex(problem: Problem) -> Attend:
    """Build compiled FlexAttention: the factor as score_mod, a number as `scale`, a block mask for causal."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    shape, scaling = problem.shape, problem.scaling
    if problem.backward and problem.device.type == "cpu":
        raise Unavailable("has no backward on a CPU")
    offset = shape.k_len - shape.q_len
    blocks = None
    if shape.causal:
        blocks = create_block_mask(
            lambda b, h, i, j: j <= i + offset, None, None, shape.q_len, shape.k_len, device=problem.device.type
        )

    def of_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score * rows[b, h, i]

        return flex_attention(q, k, v, score_mod=score_mod, block_mask=blocks, scale=1.0)

    def of_number(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return flex_attention(q, k, v, block_mask=blocks, scale=scale)

    with_rows, with_number = (torch.compile(call, fullgraph=True, dynamic=False) for call in (of_rows, of_number))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        multiplier = factor(scaling, q, k, shape.causal)
        if isinstance(multiplier, float):
            return with_number(q, k, v, multiplier)
        return with_rows(q, k, v, rows_of(scaling, q, k, shape.causal))

    return attend


def _flash_attn(name: str) -> Callable[[Problem], Attend]:
    """Build flash_attn_func of flash-attn 2, 3 or 4: q [B, S, H, D]; 3 and 4 may return lse too."""

    def build(problem: Problem) -> Attend:
        function = package(name).flash_attn_func
        require_gpu(problem.device)
        require_16_bits(problem.dtype)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, scale = prescaled(problem.scaling, q, k, problem.shape.causal)
            rows_first = (x.transpose(1, 2) for x in (q, k, v))
            return _out(function(*rows_first, softmax_scale=scale, causal=problem.shape.causal)).transpose(1, 2)

        return attend

    return build


def _gluon(problem: Problem) -> Attend:
    """Build ours with the forward in Gluon."""
    require_gpu(problem.device)
    shape = problem.shape
    of_kernels = config.Problem(shape.head_dim, shape.head_dim, problem.dtype, right=shape.causal)
    chosen = gluon_config(of_kernels, config.Target.of(problem.device))
    if chosen is None:
        raise Unavailable("takes fp16 and bf16 of head dims 33 to 256 on sm_90, with triton 3.6 or newer")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with configured("forward", chosen):
            return tritonattn.attention(q, k, v, scaling=problem.scaling, causal=shape.causal, backend="triton")

    return attend


def _folded(problem: Problem) -> Attend:
    """Build ours by backend "flash": FlashAttention or cuDNN, whichever is installed."""
    require_gpu(problem.device)
    require_16_bits(problem.dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = {"scaling": problem.scaling, "causal": problem.shape.causal}
        return tritonattn.attention(q, k, v, **options, backend="flash")

    return attend


def _out(result: Tensor | tuple) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _xformers(problem: Problem) -> Attend:
    """Build memory_efficient_attention: q [B, S, H, D], as many key heads."""
    operators = package("xformers.ops")
    require_gpu(problem.device)
    if problem.shape.heads != problem.shape.kv_heads:
        raise Unavailable("wants key heads repeated for the query heads of a group")
    _square(problem)
    bias = operators.LowerTriangularMask() if problem.shape.causal else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, scale = prescaled(problem.scaling, q, k, problem.shape.causal)
        rows_first = (x.transpose(1, 2) for x in (q, k, v))
        return operators.memory_efficient_attention(*rows_first, attn_bias=bias, scale=scale).transpose(1, 2)

    return attend


def _eager(problem: Problem) -> Attend:
    """Build products in the operands' dtype with a softmax in fp32, as models write it."""
    _fits_eager(problem)
    shape = problem.shape
    visible = None
    if shape.causal:
        i, j = (torch.arange(n, device=problem.device) for n in (shape.q_len, shape.k_len))
        visible = j <= i[:, None] + shape.k_len - shape.q_len

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        multiplier = factor(problem.scaling, q, k, shape.causal)
        logits = q @ k.mT * (multiplier if isinstance(multiplier, float) else multiplier[..., None])
        if visible is not None:
            logits = logits.masked_fill(~visible, -math.inf)
        return logits.softmax(-1, dtype=torch.float32).to(v.dtype) @ v

    return attend


# Peers other than those of PyTorch, as they are named on PyPI.
PACKAGES = ("flash-attn", "flash-attn-3", "flash-attn-4", "xformers")
# None lets PyTorch choose.
SDPA_BACKENDS = {
    "sdpa": None,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
PEERS = {
    "gluon": Peer(_gluon, "P", "ours with the forward in Gluon"),
    "flash": Peer(_folded, "operands", "ours by FlashAttention or cuDNN, the factor folded into q: backend='flash'"),
    "sdpa": Peer(_sdpa(None), "operands", "F.scaled_dot_product_attention, q multiplied before"),
    **{
        name: Peer(_sdpa(backend), "operands", f"likewise, backend {backend.name}")
        for name, backend in SDPA_BACKENDS.items()
        if backend is not None
    },
    "flex": Peer(_flex, "P", "compiled flex_attention, the factor as score_mod"),
    "flash-attn-2": Peer(_flash_attn("flash_attn"), "operands", "flash_attn, q multiplied before"),
    "flash-attn-3": Peer(_flash_attn("flash_attn_interface"), "operands", "flash_attn_interface, likewise"),
    "flash-attn-4": Peer(_flash_attn("flash_attn.cute"), "operands", "flash_attn.cute, likewise"),
    "xformers": Peer(_xformers, "operands", "xformers.ops.memory_efficient_attention, likewise"),
    "eager": Peer(_eager, "logits", "products, softmax and products, one after another"),
}
