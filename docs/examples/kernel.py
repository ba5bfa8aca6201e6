"""Causal attention with a query scale and a key scale, in three Triton kernels: python docs/examples/kernel.py

    x[i, j] = (query_scale[i] * q[i]) . (key_scale[j] * k[j])        j <= i
    lse[i]  = ln sum_j exp(x[i, j])
    p[i, j] = exp(x[i, j] - lse[i])
    out[i]  = sum_j p[i, j] * v[j]

q, k, v, out   [B, H, S, D] of fp32, bf16 or fp16, contiguous; D is a power of two >= 16
scales, lse    [B, H, S] of fp32

A kernel takes B * H heads one behind the other: row i of head h is row h * S + i of a matrix [B * H * S, D]. Products
accumulate in fp32, and the scales act on them there; p and ds are rounded to the operands' dtype before a product.
Without a GPU, Triton's interpreter runs this file. docs/kernels.md leads from here to the kernels of tritonattn.

Online softmax: Milakov & Gimelshein 2018, arXiv:1805.02867; blocks and backward: Dao 2023, arXiv:2307.08691.
"""

import os
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * log2 e): GPUs have an instruction for exp2
TILES = {"BLOCK_M": 64, "BLOCK_N": 64}  # queries and keys of a tile
LAUNCH: dict[str, Any] = {**TILES, "num_warps": 8}


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, query_scale_ptr, key_scale_ptr, out_ptr, lse_ptr,
    S, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK_M query rows of one head. Grid: (cdiv(S, BLOCK_M), B * H).

    Over the keys so far, m_i = max_j x[i, j], l_i = sum_j exp(x[i, j] - m_i) and acc = sum_j exp(x[i, j] - m_i) * v[j].
    A block that raises m_i shrinks l_i and acc by alpha = exp(m_old - m_new). x and m_i are in base 2, lse in base e.
    """
    start_m = tl.program_id(0) * BLOCK_M
    first = tl.program_id(1).to(tl.int64) * S  # row 0 of this head
    offs_m, offs_d = start_m + tl.arange(0, BLOCK_M), tl.arange(0, D)  # [BLOCK_M], [D]
    tile_m, live_m = (first + offs_m)[:, None] * D + offs_d[None, :], offs_m < S  # [BLOCK_M, D], [BLOCK_M]
    q = tl.load(q_ptr + tile_m, mask=live_m[:, None], other=0.0)  # [BLOCK_M, D]
    query_scale = tl.load(query_scale_ptr + first + offs_m, mask=live_m, other=0.0) * LOG2_E  # [BLOCK_M]

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)  # [BLOCK_M]; finite after a block: all rows have key 0
    l_i = tl.zeros([BLOCK_M], tl.float32)  # [BLOCK_M]
    acc = tl.zeros([BLOCK_M, D], tl.float32)  # [BLOCK_M, D]
    for start_n in range(0, tl.minimum(start_m + BLOCK_M, S), BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        tile_n, live_n = (first + offs_n)[:, None] * D + offs_d[None, :], offs_n < S  # [BLOCK_N, D], [BLOCK_N]
        k = tl.load(k_ptr + tile_n, mask=live_n[:, None], other=0.0)  # [BLOCK_N, D]
        v = tl.load(v_ptr + tile_n, mask=live_n[:, None], other=0.0)  # [BLOCK_N, D]
        key_scale = tl.load(key_scale_ptr + first + offs_n, mask=live_n, other=0.0)  # [BLOCK_N]

        s = tl.dot(q, k.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        x = s * query_scale[:, None] * key_scale[None, :]  # [BLOCK_M, BLOCK_N]
        x = tl.where(offs_n[None, :] <= offs_m[:, None], x, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(x, 1))  # [BLOCK_M]
        p = tl.exp2(x - m_new[:, None])  # [BLOCK_M, BLOCK_N]
        alpha = tl.exp2(m_i - m_new)  # [BLOCK_M]
        l_i = l_i * alpha + tl.sum(p, 1)  # [BLOCK_M]
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")  # [BLOCK_M, D]
        m_i = m_new

    tl.store(out_ptr + tile_m, acc / l_i[:, None], mask=live_m[:, None])
    tl.store(lse_ptr + first + offs_m, (m_i + tl.log2(l_i)) / LOG2_E, mask=live_m)


@triton.jit
def grad_query_kernel(
    q_ptr, k_ptr, v_ptr, query_scale_ptr, key_scale_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, d_query_scale_ptr,
    S, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of q and query_scale for BLOCK_M rows of one head. Grid: (cdiv(S, BLOCK_M), B * H).

        dp[i, j] = do[i] . v[j]
        ds[i, j] = p[i, j] * (dp[i, j] - delta[i])        the gradient of x; delta[i] = do[i] . out[i]
        dq[i]    = sum_j ds[i, j] * key_scale[j] * k[j]   the gradient of query_scale[i] * q[i]

    Hence the gradient of q[i] is query_scale[i] * dq[i], and that of query_scale[i] is q[i] . dq[i]. p comes from lse:
    there is no maximum to follow, and no sum.
    """
    start_m = tl.program_id(0) * BLOCK_M
    first = tl.program_id(1).to(tl.int64) * S
    offs_m, offs_d = start_m + tl.arange(0, BLOCK_M), tl.arange(0, D)  # [BLOCK_M], [D]
    tile_m, live_m = (first + offs_m)[:, None] * D + offs_d[None, :], offs_m < S  # [BLOCK_M, D], [BLOCK_M]
    q = tl.load(q_ptr + tile_m, mask=live_m[:, None], other=0.0)  # [BLOCK_M, D]
    do = tl.load(do_ptr + tile_m, mask=live_m[:, None], other=0.0)  # [BLOCK_M, D]
    query_scale = tl.load(query_scale_ptr + first + offs_m, mask=live_m, other=0.0)  # [BLOCK_M]
    lse = tl.load(lse_ptr + first + offs_m, mask=live_m, other=0.0) * LOG2_E  # [BLOCK_M]
    delta = tl.load(delta_ptr + first + offs_m, mask=live_m, other=0.0)  # [BLOCK_M]

    dq = tl.zeros([BLOCK_M, D], tl.float32)  # [BLOCK_M, D]
    for start_n in range(0, tl.minimum(start_m + BLOCK_M, S), BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        tile_n, live_n = (first + offs_n)[:, None] * D + offs_d[None, :], offs_n < S  # [BLOCK_N, D], [BLOCK_N]
        k = tl.load(k_ptr + tile_n, mask=live_n[:, None], other=0.0)  # [BLOCK_N, D]
        v = tl.load(v_ptr + tile_n, mask=live_n[:, None], other=0.0)  # [BLOCK_N, D]
        key_scale = tl.load(key_scale_ptr + first + offs_n, mask=live_n, other=0.0)  # [BLOCK_N]

        s = tl.dot(q, k.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        x = s * (query_scale * LOG2_E)[:, None] * key_scale[None, :]  # [BLOCK_M, BLOCK_N]
        p = tl.where(offs_n[None, :] <= offs_m[:, None], tl.exp2(x - lse[:, None]), 0.0)  # [BLOCK_M, BLOCK_N]
        dp = tl.dot(do, v.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        ds = p * (dp - delta[:, None])  # [BLOCK_M, BLOCK_N]
        dq = tl.dot((ds * key_scale[None, :]).to(k.dtype), k, dq, input_precision="ieee")  # [BLOCK_M, D]

    tl.store(dq_ptr + tile_m, dq * query_scale[:, None], mask=live_m[:, None])
    tl.store(d_query_scale_ptr + first + offs_m, tl.sum(q * dq, 1), mask=live_m)


@triton.jit
def grad_key_value_kernel(
    q_ptr, k_ptr, v_ptr, query_scale_ptr, key_scale_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, d_key_scale_ptr,
    S, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of k, v and key_scale for BLOCK_N keys of one head. Grid: (cdiv(S, BLOCK_N), B * H).

        dv[j] = sum_i p[i, j] * do[i]
        dk[j] = sum_i ds[i, j] * query_scale[i] * q[i]    the gradient of key_scale[j] * k[j]; ds: grad_query_kernel

    Hence the gradient of k[j] is key_scale[j] * dk[j], and that of key_scale[j] is k[j] . dk[j]. The loop goes over
    query rows, from the first that attends to the block; rows past S add 0, since their q and do are 0. Tiles lie
    transposed, keys by queries, so that p and ds meet do and q as they are. Each element has one writer: no atomics.
    """
    start_n = tl.program_id(0) * BLOCK_N
    first = tl.program_id(1).to(tl.int64) * S
    offs_n, offs_d = start_n + tl.arange(0, BLOCK_N), tl.arange(0, D)  # [BLOCK_N], [D]
    tile_n, live_n = (first + offs_n)[:, None] * D + offs_d[None, :], offs_n < S  # [BLOCK_N, D], [BLOCK_N]
    k = tl.load(k_ptr + tile_n, mask=live_n[:, None], other=0.0)  # [BLOCK_N, D]
    v = tl.load(v_ptr + tile_n, mask=live_n[:, None], other=0.0)  # [BLOCK_N, D]
    key_scale = tl.load(key_scale_ptr + first + offs_n, mask=live_n, other=0.0)  # [BLOCK_N]

    dk, dv = tl.zeros([BLOCK_N, D], tl.float32), tl.zeros([BLOCK_N, D], tl.float32)  # [BLOCK_N, D]
    for start_m in range(start_n, S, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        tile_m, live_m = (first + offs_m)[:, None] * D + offs_d[None, :], offs_m < S  # [BLOCK_M, D], [BLOCK_M]
        q = tl.load(q_ptr + tile_m, mask=live_m[:, None], other=0.0)  # [BLOCK_M, D]
        do = tl.load(do_ptr + tile_m, mask=live_m[:, None], other=0.0)  # [BLOCK_M, D]
        query_scale = tl.load(query_scale_ptr + first + offs_m, mask=live_m, other=0.0)  # [BLOCK_M]
        lse = tl.load(lse_ptr + first + offs_m, mask=live_m, other=0.0) * LOG2_E  # [BLOCK_M]
        delta = tl.load(delta_ptr + first + offs_m, mask=live_m, other=0.0)  # [BLOCK_M]

        s = tl.dot(k, q.T, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        x = s * key_scale[:, None] * (query_scale * LOG2_E)[None, :]  # [BLOCK_N, BLOCK_M]
        p = tl.where(offs_n[:, None] <= offs_m[None, :], tl.exp2(x - lse[None, :]), 0.0)  # [BLOCK_N, BLOCK_M]
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")  # [BLOCK_N, D]
        dp = tl.dot(v, do.T, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        ds = p * (dp - delta[None, :])  # [BLOCK_N, BLOCK_M]
        dk = tl.dot((ds * query_scale[None, :]).to(q.dtype), q, dk, input_precision="ieee")  # [BLOCK_N, D]

    tl.store(dk_ptr + tile_n, dk * key_scale[:, None], mask=live_n[:, None])
    tl.store(dv_ptr + tile_n, dv, mask=live_n[:, None])
    tl.store(d_key_scale_ptr + first + offs_n, tl.sum(k * dk, 1), mask=live_n)


class Attention(torch.autograd.Function):
    """`Attention.apply(q, k, v, query_scale, key_scale)` returns out; all five have gradients."""

    @staticmethod
    def forward(ctx, *operands):
        operands = [x.contiguous() for x in operands]
        out, lse = torch.empty_like(operands[0]), torch.empty_like(operands[3])
        B, H, S, D = out.shape
        forward_kernel[triton.cdiv(S, TILES["BLOCK_M"]), B * H](*operands, out, lse, S, D, **LAUNCH)
        ctx.save_for_backward(*operands, out, lse)
        return out

    @staticmethod
    def backward(ctx, do):
        q, k, v, query_scale, key_scale, out, lse = ctx.saved_tensors
        B, H, S, D = out.shape
        delta = (do.float() * out.float()).sum(-1)  # [B, H, S]
        saved = (q, k, v, query_scale, key_scale, do.contiguous(), lse, delta)
        dq, dk, dv, d_query_scale, d_key_scale = map(torch.empty_like, saved[:5])
        grad_query_kernel[triton.cdiv(S, TILES["BLOCK_M"]), B * H](*saved, dq, d_query_scale, S, D, **LAUNCH)
        grad_key_value_kernel[triton.cdiv(S, TILES["BLOCK_N"]), B * H](*saved, dk, dv, d_key_scale, S, D, **LAUNCH)
        return dq, dk, dv, d_query_scale, d_key_scale


if __name__ == "__main__":
    from tritonattn import scaled_attention

    torch.manual_seed(0)
    shape, device = (1, 2, 100, 32), "cuda" if torch.cuda.is_available() else "cpu"
    operands = [torch.randn(shape, device=device).requires_grad_() for _ in range(3)]
    operands += [(0.5 * torch.rand(shape[:3], device=device)).requires_grad_() for _ in range(2)]
    out, expected = Attention.apply(*operands), scaled_attention(*operands, scale=1.0, causal=True, backend="reference")
    ours, theirs = ([x, *torch.autograd.grad(x.square().sum(), operands)] for x in (out, expected))
    print("largest difference to the eager reference")
    for name, a, b in zip(["out", "dq", "dk", "dv", "d_query_scale", "d_key_scale"], ours, theirs, strict=True):
        print(f"{name:13} {(a - b).abs().max():.1e} of {b.abs().max():.1e}")
