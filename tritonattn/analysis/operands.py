"""Properties of a layer that its q and k show: positions, and QK-norm."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.observation import ObservedCall

_ROWS = 64  # the last ones, whose products of pairs are compared
_FITTED = 0.01  # of 1: how far rows may lie from the ellipsoid of a QK-norm with weights


def rotary_of(one: ObservedCall) -> bool | None:
    """Read the positions off a call for one token repeated, which leaves nothing but positions to tell rows apart.

    True where q . k depends on the distance of the pair (rotary), False where it is the same for all pairs and the call
    has no bias of pairs (none), and None otherwise: positions added to the tokens, a bias, rows without a width.
    """
    visible, terms = one.visibility, one.request.terms
    if visible.q_len != visible.k_len:
        return None
    counted = visible.attending_rows()[0].any(0) & visible.seen_keys()[0].any(0)
    chosen = counted.expand(visible.k_len).nonzero()[-_ROWS:, 0]
    q, k = (x[0, :, chosen].double() for x in (one.q, one.k))
    k = k.repeat_interleave(q.shape[0] // k.shape[0], dim=0)
    size = float((q.norm(dim=-1).amax() * k.norm(dim=-1).amax()) if chosen.numel() > 2 else 0.0)
    if not 0 < size < torch.inf:
        return None
    products = q @ k.transpose(-1, -2)  # [Hq, rows, rows]
    near = (0.02 if one.q.dtype.itemsize == 2 else 0.001) * size
    if _differ(products, products[:, :1, :1]) <= near:
        return False if terms.bias is None and terms.relative_bias is None else None
    return True if _differ(products[:, 1:, 1:], products[:, :-1, :-1]) <= near else None


def _differ(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().amax())


def is_normalised(x: Tensor) -> bool:
    """True where the rows of x [B, H, S, D], per head or joined over heads, are outputs of an RMS norm with weights.

    Such rows lie on an ellipsoid, sum_d weight_d x_d^2 = 1. More rows than weights tell; of fewer, their norms.
    """
    rows = x.transpose(1, 2)  # [B, S, H, D]
    return _on_ellipsoid(rows.flatten(0, 2)) or _on_ellipsoid(rows.flatten(2).flatten(0, 1))


def _on_ellipsoid(x: Tensor) -> bool:
    """True where the rows of x [N, D] that are not 0 lie on an ellipsoid around 0 with the axes as its own."""
    squares = x.double().square()
    squares = squares[squares.sum(-1) > 0].unique(dim=0)
    norms = squares.sum(-1)
    if not (norms.numel() > 1 and bool(norms.isfinite().all())):
        return False
    if float(norms.amax() - norms.amin()) <= _FITTED * float(norms.mean()):
        return True
    if squares.shape[0] <= 2 * squares.shape[1]:
        return False
    weights = torch.linalg.lstsq(squares, torch.ones_like(norms)[:, None]).solution
    return float((squares @ weights - 1).abs().amax()) <= _FITTED
