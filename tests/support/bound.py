"""The error bound that every backend is held to."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_bound(
    ours: Tensor, exact: Tensor, eager: Tensor, dtype: torch.dtype, name: str = "result", summands: float = 0.0
) -> None:
    """|ours - exact| <= 2 * |eager - exact| + band in maximum norms.

    exact is float64, eager the eager computation in `dtype`; band = eps(dtype) * max |exact|, 16 eps for
    float32. For float64 there is nothing more exact: the band is then 2^14 eps. Where exact is what is left of
    `summands` that cancel, the band is that of their size.
    """
    assert ours.shape == exact.shape, f"{name}: expected shape {tuple(exact.shape)}, got {tuple(ours.shape)}"
    assert ours.isfinite().all(), f"{name}: expected finite values, got {ours[~ours.isfinite()][:3].tolist()}"
    if ours.numel() == 0:
        return
    allowed = allowed_error(exact, eager, dtype, summands)
    error = (ours.double() - exact.double()).abs().max()
    assert error <= allowed, f"{name}: expected an error of at most {allowed:.3e}, got {error:.3e}"


def allowed_error(exact: Tensor, eager: Tensor, dtype: torch.dtype, summands: float = 0.0) -> float:
    """The right side of the bound."""
    exact = exact.double()
    band = torch.finfo(dtype).eps * {torch.float32: 16, torch.float64: 2**14}.get(dtype, 1)
    return (2 * (eager.double() - exact).abs().max() + band * max(exact.abs().max().item(), summands)).item()
