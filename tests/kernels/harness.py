"""One check for all kernel tests: outputs and every gradient against float64, within the bound."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import tritonattn
from tests.support.bound import assert_within_bound
from tests.support.masks import MASKS
from tests.support.packed import Packed, packed_operands

Tensors = dict[str, Tensor]

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "after": {"softcap": 1.5, "bias_after_softcap": True},
    "sinks": {"sinks": "sinks of rows"},
    "dropout": {"dropout_p": 0.3},
    "aux": {"return_aux": True},
    "softcap aux": {"softcap": 1.5, "return_aux": True},
    "sinks dropout": {"sinks": "sinks of rows", "dropout_p": 0.3},
    "everything": {"softcap": 1.5, "sinks": "sinks", "dropout_p": 0.3, "return_aux": True},
}


def inputs(
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch: int = 2,
    kv_heads: int = 1,
    group: int = 2,
    q_len: int = 21,
    k_len: int = 35,
    head_dim: int = 16,
    value_dim: int = 16,
    scales: tuple[str, ...] = (),
    seed: int = 0,
) -> Tensors:
    """Random q, k, v and the scales, sinks and biases asked for, of either sign; some scales 0, some biases -inf."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    heads = kv_heads * group
    tensors = {
        "q": normal(batch, heads, q_len, head_dim).to(dtype),
        "k": normal(batch, kv_heads, k_len, head_dim).to(dtype),
        "v": normal(batch, kv_heads, k_len, value_dim).to(dtype),
    }
    if "query_scale" in scales:
        tensors["query_scale"] = normal(batch, heads, q_len)
        tensors["query_scale"][..., ::7] = 0
    if "key_scale" in scales:
        tensors["key_scale"] = normal(batch, kv_heads, k_len)
        tensors["key_scale"][..., ::5] = 0
    if "gain" in scales:
        tensors["gain"] = normal(heads, 1).abs() + 0.5
    if "sinks" in scales:
        tensors["sinks"] = normal(heads)
    if "sinks of rows" in scales:
        tensors["sinks"] = normal(batch, heads, q_len)
    if "key_bias" in scales:
        tensors["key_bias"] = 2 * normal(batch, heads, k_len)
        tensors["key_bias"][..., ::5] = -torch.inf
    if "bias" in scales:
        tensors["bias"] = (2 * normal(batch, heads, q_len, k_len)).to(dtype)
        tensors["bias"][..., ::5] = -torch.inf
    if "relative_bias" in scales:
        tensors["relative_bias"] = (2 * normal(1, heads, q_len, 16)).to(dtype)
    if "relative_scale" in scales:
        tensors["relative_scale"] = normal(1, heads, 1, 16).to(dtype)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def of_form(
    form: str, dtype: torch.dtype, device: torch.device, *, scales: tuple[str, ...] = (), **sizes: int
) -> tuple[Tensors, dict[str, Any]]:
    """The tensors and the arguments of one of `FORMS`."""
    arguments = dict(FORMS[form])
    if "sinks" in arguments:
        scales = (*scales, arguments.pop("sinks"))
    return inputs(dtype, device, scales=scales, **sizes), arguments


def mask(name: str, device: torch.device, batch: int = 2, heads: int = 2, q_len: int = 21, k_len: int = 35) -> dict:
    """The arguments of one of MASKS, on the device."""
    arguments = MASKS[name](batch, heads, q_len, k_len)
    return {key: x.to(device) if isinstance(x, Tensor) else x for key, x in arguments.items()}


def packed_inputs(
    packed: Packed,
    dtype: torch.dtype,
    device: torch.device,
    *,
    kv_heads: int = 1,
    group: int = 2,
    head_dim: int = 16,
    value_dim: int = 16,
    scales: tuple[str, ...] = (),
) -> Tensors:
    """Random q, k, v of `attention_varlen`, NaN outside the sequences; if asked for a gain per row, sinks, biases."""
    heads, random = kv_heads * group, torch.Generator().manual_seed(2)
    tensors = packed_operands(packed, dtype, (heads, kv_heads), (head_dim, value_dim))
    if "gain" in scales:
        tensors["gain"] = torch.randn(heads, packed.q_len, generator=random)
        tensors["gain"][:, ::7] = 0
    if "sinks" in scales:
        tensors["sinks"] = torch.randn(heads, generator=random)
    if "sinks of rows" in scales:
        tensors["sinks"] = torch.randn(heads, packed.q_len, generator=random)
    if "key_bias" in scales:
        tensors["key_bias"] = torch.randn(heads, tensors["k"].shape[0], generator=random)
    return {name: tensor.detach().to(device) for name, tensor in tensors.items()}


def check(
    tensors: Tensors,
    attend: Callable[..., Any] = tritonattn.scaled_attention,
    *,
    summands: float = 0.0,
    **arguments: Any,
) -> None:
    """Hold a backend to the bound: all results and the gradient of every tensor, for random gradients.

    summands   size of what cancels in gradients: in a row of one key, d_out . v and d_out . out
    """
    dtype = tensors["q"].dtype
    ours, exact, eager = ours_exact_eager(tensors, attend, **arguments)
    for name, result in ours.items():
        hidden = exact[name].isneginf()  # lse and max_logit of rows without keys
        assert result.dtype == eager[name].dtype, name
        assert torch.equal(result.isneginf(), hidden), f"{name}: expected -inf for the rows without keys, only"
        values = (x.masked_fill(hidden, 0) for x in (result, exact[name], eager[name]))
        assert_within_bound(*values, dtype, name=name, summands=summands if name in tensors else 0.0)


def check_each_head(tensors: Tensors, attend: Callable[..., Any], **arguments: Any) -> None:
    """The gradients of q, k and v, as many heads of each, head by head: none may hide behind another's larger ones."""
    ours, exact, eager = ours_exact_eager(tensors, attend, **arguments)
    for name in ("q", "k", "v"):
        for head, values in enumerate(zip(*(x[name].unbind(1) for x in (ours, exact, eager)), strict=True)):
            assert_within_bound(*values, tensors["q"].dtype, name=f"{name} of head {head}")


def ours_exact_eager(
    tensors: Tensors,
    attend: Callable[..., Any],
    *,
    backend: str = "triton",
    batch_invariant: bool = False,
    **arguments: Any,
) -> tuple[Tensors, Tensors, Tensors]:
    """`run` by a backend, and by the reference in float64 and in the dtype of the tensors.

    max_logit takes no gradient under batch_invariant.
    """
    arguments["of_aux"] = ("lse", "entropy") if batch_invariant else ("lse", "max_logit", "entropy")
    shape = (*tensors["q"].shape[:-1], tensors["v"].shape[-1])
    random = torch.Generator().manual_seed(1)
    d_out = torch.randn(shape, generator=random).to(tensors["q"])
    exact = run(as_double(tensors), d_out, attend, backend="reference", **arguments)
    eager = run(tensors, d_out, attend, backend="reference", **arguments)
    return run(tensors, d_out, attend, backend=backend, batch_invariant=batch_invariant, **arguments), exact, eager


def run(
    tensors: Tensors,
    d_out: Tensor,
    attend: Callable[..., Any],
    gradients: bool = True,
    of_aux: tuple[str, ...] = ("lse",),
    **arguments: Any,
) -> Tensors:
    """out, aux where asked for, and the gradients of a call; always one dropout mask.

    Under gradients of out, and of these results of aux.
    """
    torch.manual_seed(4)
    leaves = {name: tensor.detach().requires_grad_(gradients) for name, tensor in tensors.items()}
    result = attend(**leaves, **arguments)
    out, *aux = (result[0], *result[1]) if isinstance(result, tuple) else (result,)
    results, directions = {"out": out}, [d_out.to(out.dtype)]
    if aux:
        results |= dict(zip(tritonattn.AttentionAux._fields, aux, strict=True))
        for number in range(len(of_aux)):
            ramp = torch.linspace(-1, 1, aux[0].numel()).reshape(aux[0].shape).to(aux[0])
            directions.append(ramp.roll(number, -1))
    if not gradients:
        return results
    differentiated = [out, *[results[name] for name in of_aux if aux]]
    of_leaves = torch.autograd.grad(differentiated, list(leaves.values()), directions)
    return {name: x.detach() for name, x in results.items()} | dict(zip(leaves, of_leaves, strict=True))


def by_kernels(
    tensors: Tensors,
    attend: Callable[..., Any] = tritonattn.scaled_attention,
    d_out: Tensor | None = None,
    **arguments: Any,
) -> Tensors:
    """`run` by backend "triton", under gradients of 1 where none are given."""
    d_out = tensors["q"].new_ones(*tensors["q"].shape[:-1], tensors["v"].shape[-1]) if d_out is None else d_out
    return run(tensors, d_out, attend, backend="triton", **arguments)


def assert_same(found: Tensors, expected: Tensors) -> None:
    for name, result in expected.items():
        assert torch.equal(found[name], result), name


def as_double(tensors: Tensors) -> Tensors:
    return {name: tensor.double() for name, tensor in tensors.items()}
