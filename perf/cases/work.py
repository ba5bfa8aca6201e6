"""Floating-point operations and bytes of a call."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# A forward has two products, a backward five: the logits once more, and the gradients of P, Q, K and V.
_BACKWARD_OVER_FORWARD = 2.5
PASSES = {"forward": 1.0, "backward": _BACKWARD_OVER_FORWARD, "forward+backward": 1 + _BACKWARD_OVER_FORWARD}


@dataclass(frozen=True)
class Shape:
    """Sizes: q [batch, heads, q_len, head_dim], k and v [batch, kv_heads, k_len, head_dim]; causal or full."""

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
    """Count pairs (i, j) with j <= i + k_len - q_len where causal, in closed form; all pairs where not.

    The last row attends to all k_len keys, the one before it to one key less, and so on, down to rows without keys.
    """
    if not causal:
        return q_len * k_len
    rows = min(q_len, k_len)  # rows with keys
    return rows * k_len - rows * (rows - 1) // 2


def forward_flops(shape: Shape) -> int:
    """Count two products, Q K^T and P V: head_dim multiplications and additions a visible pair each; no softmax."""
    return 4 * shape.batch * shape.heads * visible_pairs(shape.q_len, shape.k_len, shape.causal) * shape.head_dim


def flops(shape: Shape, passes: str) -> int:
    """Count the operations of "forward", "backward" or "forward+backward"; recomputation in a kernel is not counted."""
    return round(PASSES[passes] * forward_flops(shape))


def bytes_moved(shape: Shape, passes: str, dtype: torch.dtype) -> int:
    """Count the least bytes: every operand read once, every result written once.

    forward     reads q, k, v and writes out
    backward    reads q, k, v, out and its gradient, and writes the gradients of q, k and v
    """
    operands = shape.q_elements + 2 * shape.k_elements
    forward = operands + shape.q_elements
    backward = 2 * operands + 2 * shape.q_elements
    elements = {"forward": forward, "backward": backward, "forward+backward": forward + backward}[passes]
    return elements * dtype.itemsize


def decode_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Count the bytes of a decoding step: nearly all are the cached keys and values; then q and out."""
    return 2 * (shape.k_elements + shape.q_elements) * dtype.itemsize


def matmul_flops(size: int) -> int:
    """Count the operations of a product of square matrices."""
    return 2 * size**3
