"""`warmup`: compile kernels before the first call needs them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .attention import attention

Shape = tuple[int, int, int, int]


def warmup(
    shapes: Iterable[Shape | tuple[Shape, Shape, Shape]],
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    backward: bool = False,
    **options: Any,
) -> None:
    """Compile the kernels that calls of `attention` will launch, by calling it once with zeros.

    A first call takes seconds to compile, and none may be compiled while a CUDA graph is captured. One shape warms up
    other batch sizes, lengths and numbers of heads too, as long as these stay the same:

    - head dims, dtype, options, and the number of query heads per key head;
    - at most 1024 rows and keys, or more;
    - more than 16 rows, or at most 16 (then also few keys, or some hundred and more);
    - strides that are multiples of 16: head dims, and with scaled rows or keys or a dense mask also lengths. A shape
      where one of these is no multiple of 16 warms up itself only.

    Args:
        shapes: A list with a shape per call: [B, Hq, Sq, D] of q, k and v alike, or the three shapes of (q, k, v).
        dtype: The dtype of q, k and v.
        device: Where the calls will run.
        backward: Compile the backward pass too, and the forward pass that keeps what it needs, besides the one of
            calls without gradients.
        options: As of `attention`: scaling, gain, causal, window, ...; tensors on `device`.

    Raises:
        ValueError: Another form of shapes, or a device that this machine lacks. Errors of `attention` pass through.

    >>> import tritonattn
    >>> tritonattn.warmup([(1, 8, 128, 64)], device="cpu", scaling="key_count", causal=True, backward=True)
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: expected one of this machine, got {device!r}: {error}") from error
    for shape in shapes:
        each: Any = shape if hasattr(shape, "__len__") and len(shape) == 3 else (shape,) * 3
        if any(not hasattr(one, "__len__") or len(one) != 4 for one in each):
            raise ValueError(f"shapes: expected a list of (B, H, S, D), or of three such for q, k and v, got {shape}")
        q, k, v = (torch.zeros(one, dtype=dtype, device=device, requires_grad=backward) for one in each)
        with torch.no_grad():
            attention(q, k, v, **options)
        if backward:
            with torch.enable_grad():
                result = attention(q, k, v, **options)
                out = result[0] if isinstance(result, tuple) else result
                given = [*options.values(), *_parameters(options.get("scaling"))]
                leaves = [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad]
                # Not out.backward(): a learned scaling or gain would be left with a gradient of zeros.
                torch.autograd.grad(out, (q, k, v, *leaves), torch.zeros_like(out), allow_unused=True)


def _parameters(scaling: Any) -> Iterable[torch.Tensor]:
    return scaling.parameters() if isinstance(scaling, torch.nn.Module) else ()
