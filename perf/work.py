"""What a call has to do, counted: floating-point operations and bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Of two products of a forward, the backward makes five: the logits once more, and the gradients of P, Q, K and V.
_BACKWARD_OVER_FORWARD = 2.5
PASSES = {"forward": 1.0, "backward": _BACKWARD_OVER_FORWARD, "forward+backward": 1 + _BACKWARD_OVER_FORWARD}


@dataclass(frozen=True)
class Shape:
    """q [batch, heads, q_len, head_dim]; k and v [batch, kv_heads, k_len, head_dim]; a causal mask or none."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    causal: bool

    @property
    def q_elements(self) -> int:
        return self.batch * self.heads * self.q_len * self.head_dim

    @property
    def k_elements(self) -> int:
        return self.batch * self.kv_heads * self.k_len * self.head_dim

    @property
    def logits(self) -> int:
        """Pairs in the masks of all heads, visible or not."""
        return self.batch * self.heads * self.q_len * self.k_len


def visible_pairs(q_len: int, k_len: int, causal: bool) -> int:
    """Pairs (i, j) with j <= i + k_len - q_len where causal, in closed form; all where not.

    The last row sees all k_len keys, the one before it one key less, and so on, down to rows that see none.
    """
    if not causal:
        return q_len * k_len
    rows = min(q_len, k_len)  # those that see a key
    return rows * k_len - rows * (rows - 1) // 2


def forward_flops(shape: Shape) -> int:
    """Two products, Q K^T and P V, each of head_dim multiplications and additions a visible pair; no softmax."""
    return 4 * shape.batch * shape.heads * visible_pairs(shape.q_len, shape.k_len, shape.causal) * shape.head_dim


def flops(shape: Shape, passes: str) -> int:
    """Of "forward", "backward" or "forward+backward". What a kernel computes again on top is not counted."""
    return round(PASSES[passes] * forward_flops(shape))


def bytes_moved(shape: Shape, passes: str, dtype: torch.dtype) -> int:
    """The least: every operand read once, every result written once.

    forward     reads q, k, v and writes out
    backward    reads q, k, v, out and its gradient, and writes the gradients of q, k and v
    """
    operands = shape.q_elements + 2 * shape.k_elements
    forward = operands + shape.q_elements
    backward = 2 * operands + 2 * shape.q_elements
    elements = {"forward": forward, "backward": backward, "forward+backward": forward + backward}[passes]
    return elements * dtype.itemsize


def decode_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Of a decoding step: the cached keys and values, which are nearly all, and q and out."""
    return 2 * (shape.k_elements + shape.q_elements) * dtype.itemsize


def matmul_flops(size: int) -> int:
    """Of a product of square matrices."""
    return 2 * size**3
