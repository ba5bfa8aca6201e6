"""The error bound that every backend is held to."""

import torch
from torch import Tensor

# Units of float32's eps: every result, and gradients on a CPU that PyTorch's kernel computes.
BAND = 16
PYTORCH_GRADIENT_BAND = 64


def assert_within_bound(
    ours: Tensor,
    exact: Tensor,
    eager: Tensor,
    dtype: torch.dtype,
    name: str = "result",
    summands: float = 0.0,
    band: int = BAND,
) -> None:
    """|ours - exact| <= 2 * |eager - exact| + band * eps * max |exact| in maximum norms.

    exact is float64, eager the eager computation in `dtype`. `band` is that of float32; in 16 bits it is 1, and for
    float64, which has nothing more exact, 2^14. Where exact is the remainder of `summands` that cancel, their size
    stands for max |exact|.
    """
    assert ours.shape == exact.shape, f"{name}: expected shape {tuple(exact.shape)}, got {tuple(ours.shape)}"
    assert ours.isfinite().all(), f"{name}: expected finite values, got {ours[~ours.isfinite()][:3].tolist()}"
    if ours.numel() == 0:
        return
    allowed = allowed_error(exact, eager, dtype, summands, band)
    error = (ours.double() - exact.double()).abs().max()
    assert error <= allowed, f"{name}: expected an error of at most {allowed:.3e}, got {error:.3e}"


def allowed_error(exact: Tensor, eager: Tensor, dtype: torch.dtype, summands: float = 0.0, band: int = BAND) -> float:
    """The right side of the bound."""
    exact = exact.double()
    width = torch.finfo(dtype).eps * {torch.float32: band, torch.float64: 2**14}.get(dtype, 1)
    return (2 * (eager.double() - exact).abs().max() + width * max(exact.abs().max().item(), summands)).item()
