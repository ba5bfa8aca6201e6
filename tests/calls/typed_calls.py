# pyright: reportUnnecessaryTypeIgnoreComment=true
"""The types that a type checker gives to calls; pyright reads this file in `make lint`, nothing runs it."""

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import assert_type

from tritonattn import SCALINGS, attention, attention_decode, attention_varlen, scaled_attention
from tritonattn.calls.results import AttentionAux
from tritonattn.distributed import context_parallel_attention, context_parallel_decode
from tritonattn.nn import ScaledAttention
from tritonattn.scaling import LogKeyCount, QwenLogn

Both = tuple[Tensor, AttentionAux]


def return_aux_decides(q: Tensor, k: Tensor, v: Tensor, n: Tensor, mesh: DeviceMesh, flag: bool) -> None:
    assert_type(attention(q, k, v, causal=True), Tensor)
    assert_type(attention(q, k, v, return_aux=False), Tensor)
    assert_type(attention(q, k, v, scaling="dim", return_aux=True), Both)
    assert_type(attention(q, k, v, return_aux=flag), Tensor | Both)

    assert_type(scaled_attention(q, k, v, query_scale=q), Tensor)
    assert_type(scaled_attention(q, k, v, return_aux=True), Both)
    assert_type(scaled_attention(q, k, v, return_aux=flag), Tensor | Both)

    assert_type(attention_varlen(q, k, v, n, n, 3, 5), Tensor)
    assert_type(attention_varlen(q, k, v, n, n, 3, 5, return_aux=True), Both)
    assert_type(attention_varlen(q, k, v, n, n, 3, 5, return_aux=flag), Tensor | Both)

    assert_type(attention_decode(q, k, v, key_lengths=n), Tensor)
    assert_type(attention_decode(q, k, v, key_lengths=n, return_aux=True), Both)
    assert_type(attention_decode(q, k, v, key_lengths=n, return_aux=flag), Tensor | Both)

    assert_type(context_parallel_attention(q, k, v, mesh=mesh), Tensor)
    assert_type(context_parallel_attention(q, k, v, mesh=mesh, return_aux=True), Both)
    assert_type(context_parallel_attention(q, k, v, mesh=mesh, return_aux=flag), Tensor | Both)

    assert_type(context_parallel_decode(q, k, v, mesh=mesh, key_lengths=n), Tensor)
    assert_type(context_parallel_decode(q, k, v, mesh=mesh, key_lengths=n, return_aux=True), Both)
    assert_type(context_parallel_decode(q, k, v, mesh=mesh, key_lengths=n, return_aux=flag), Tensor | Both)


def words_of_a_call(q: Tensor) -> None:
    attention(q, q, q, bias=q, relative_bias=q, relative_right=3, bias_after_softcap=True, softcap=1.0)
    attention(q, q, q, is_causal=True)  # pyright: ignore[reportCallIssue]
    attention(q, q, q, True)  # pyright: ignore[reportCallIssue]
    attention(q, q, q, causal="yes")  # pyright: ignore[reportArgumentType]
    attention_decode(q, q, q)  # pyright: ignore[reportCallIssue]
    attention(q, q, q, backend="sdpa", scaling="log_key_count:64")
    attention(q, q, q, backend="tritton")  # pyright: ignore[reportArgumentType]
    ScaledAttention(64, 4, scaling="ssmax", backend="tritton")  # pyright: ignore[reportArgumentType]


def modes_by_name() -> None:
    assert_type(SCALINGS["log_key_count"](base=512), LogKeyCount)
    assert_type(SCALINGS["qwen_logn"](train_length=2048), QwenLogn)
    SCALINGS["log_key_count"](length=5)  # pyright: ignore[reportCallIssue]
    SCALINGS["key_count"](base=5)  # pyright: ignore[reportCallIssue]
