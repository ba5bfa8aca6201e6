"""The machine's limits, measured in every sweep: a product of matrices, and a copy."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .attention import DTYPES
from .contest import Contest, Entrant, Results
from .work import matmul_flops

SUITE = "ceilings"
MATMUL, COPY = "matmul", "copy"
_COPIED_BYTES = {"cuda": 2**30, "cpu": 2**27}  # more than caches hold
_SIZE = {"cuda": 8192, "cpu": 1024}  # rows and columns


def contests(dtypes: tuple[str, ...], device: torch.device, quick: bool) -> list[Contest]:
    """List a product of square matrices in each dtype (fp32: IEEE, as in the kernels), and a copy."""
    size = _SIZE[device.type] // (2 if quick else 1)
    products = [
        Contest(SUITE, {"size": size, "dtype": dtype}, _matmul(size, dtype, device), MATMUL, device, matmul_flops(size))
        for dtype in dtypes
    ]
    count = _COPIED_BYTES[device.type] // (4 if quick else 1)
    return [*products, Contest(SUITE, {"bytes": count}, _copy(count, device), COPY, device, bytes=2 * count)]


def _matmul(size: int, dtype: str, device: torch.device) -> Callable[[], list[Entrant]]:
    def prepare() -> Callable[[int], Results]:
        a, b = torch.randn(2, size, size, device=device).to(DTYPES[dtype])
        return lambda number: {"product": a @ b}

    return lambda: [Entrant(MATMUL, "", prepare, None)]


def _copy(count: int, device: torch.device) -> Callable[[], list[Entrant]]:
    def prepare() -> Callable[[int], Results]:
        source, target = torch.zeros(2, count, dtype=torch.uint8, device=device)
        return lambda number: {"copy": target.copy_(source)}

    return lambda: [Entrant(COPY, "", prepare, None)]
