"""Small Triton kernels whose PTX has everything that sm_80 and sm_90 offer."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = offsets < size
    total = tl.load(x_ptr + offsets, mask=keep) + tl.load(y_ptr + offsets, mask=keep)
    tl.store(out_ptr + offsets, total, mask=keep)


@triton.jit
def row_softmax(x_ptr, out_ptr, columns, COLUMNS: tl.constexpr):
    offsets = tl.arange(0, COLUMNS)
    keep = offsets < columns
    x = tl.load(x_ptr + tl.program_id(0) * columns + offsets, mask=keep, other=float("-inf"))
    weights = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + tl.program_id(0) * columns + offsets, weights / tl.sum(weights, 0), mask=keep)


@triton.jit
def product(a_ptr, b_ptr, out_ptr, rows, columns, depth, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """out[rows, columns] = a[rows, depth] @ b[depth, columns] by pointers, in a pipelined loop."""
    row, column, inner = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    accumulator = tl.zeros((M, N), tl.float32)
    for start in range(0, depth, K):
        keep = start + inner < depth
        a_keep, b_keep = (row < rows)[:, None] & keep[None], keep[:, None] & (column < columns)[None]
        a = tl.load(a_ptr + row[:, None] * depth + start + inner[None], a_keep, 0.0)
        b = tl.load(b_ptr + (start + inner[:, None]) * columns + column[None], b_keep, 0.0)
        accumulator = tl.dot(a, b, accumulator)
    keep = (row < rows)[:, None] & (column < columns)[None]
    tl.store(out_ptr + row[:, None] * columns + column[None], accumulator, keep)


@triton.jit
def described_product(a, b, out, depth, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """The same by tensor descriptors."""
    row = tl.program_id(0) * M
    accumulator = tl.zeros((M, N), tl.float32)
    for start in range(0, depth, K):
        accumulator = tl.dot(a.load([row, start]), b.load([start, 0]), accumulator)
    out.store([row, 0], accumulator.to(tl.bfloat16))


@triton.jit
def random_bits(out_ptr, seed, BLOCK: tl.constexpr):
    """Philox: mul.hi.u32."""
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.randint(seed, offsets))


@triton.jit
def count(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Atomics on few addresses."""
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.atomic_add(out_ptr + x, 1)
