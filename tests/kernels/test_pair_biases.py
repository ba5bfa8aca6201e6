"""Biases of pairs, dense and by distance, before a softcap and behind it, against their formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import harness
from tests.support.bound import assert_within_bound
from tests.support.masks import MASKS, visible_pairs
from tests.support.pair_biases import Tensors, by_formula
from tests.support.pairs import in_turn
from tritonattn.backends import triton as backend
from tritonattn.core.call import AttentionCall, ForwardResult, Gradients, Logits, Needs
from tritonattn.core.visibility import Visibility

HALF, SINGLE = torch.float16, torch.float32


def with_biases(
    tensors: Tensors, dtype: torch.dtype, dense: tuple[int, ...] | None, relative: tuple[int, ...] | None
) -> Tensors:
    """The tensors, a bias of shape `dense` and a relative one of shape `relative`, some -inf among them."""
    random, kv_heads = torch.Generator().manual_seed(3), tensors["k"].shape[1]
    tensors = dict(tensors)
    if "key_bias" in tensors:
        tensors["key_bias"] = tensors["key_bias"].unflatten(1, (kv_heads, -1))
    for name, shape in (("bias", dense), ("relative_bias", relative)):
        if shape is not None:
            bias = 2 * torch.randn(shape, generator=random)
            bias.view(-1)[::5] = -torch.inf
            tensors[name] = bias.to(tensors["q"].device, dtype)
    return tensors


def call_of(tensors: Tensors, visibility: Visibility, scale: float = 0.3, **options: Any) -> AttentionCall:
    terms = {name: x for name, x in tensors.items() if name not in "qkv"}
    q, k, v = (tensors[name] for name in "qkv")
    return AttentionCall(q, k, v, visibility, Logits(scale, **terms, **options))


def results(call: AttentionCall, d_out: Tensor, d_lse: Tensor) -> tuple[ForwardResult, Gradients]:
    """out and aux of the kernels, and gradients of every tensor of the call."""
    rounding = torch.zeros(d_out.shape, dtype=torch.int8, device=d_out.device) if call.q.dtype == HALF else None
    found = backend.forward(call, True, rounding)
    needs = Needs(*(x is not None for x in call.tensors))
    return found, backend.backward(call, found.out, found.lse, d_out, d_lse, needs, rounding)


def check(
    tensors: Tensors, visibility: Visibility, visible: Tensor, own: Tensor, summands: float = 0.0, **options: Any
) -> None:
    """Hold all results and gradients to the bound."""
    random, dtype = torch.Generator().manual_seed(1), tensors["q"].dtype
    d_out = torch.randn(*tensors["q"].shape[:3], tensors["v"].shape[3], generator=random).to(tensors["q"])
    d_lse = torch.linspace(-1, 1, d_out[..., 0].numel()).reshape(d_out.shape[:3]).to(d_out.device)
    found, gradients = results(call_of(tensors, visibility, **options), d_out, d_lse)
    exact, eager = (expected(tensors, to, d_out, d_lse, visible, own, **options) for to in (torch.float64, dtype))
    ours = found._asdict() | {f"d_{name}": x for name, x in gradients._asdict().items() if x is not None}
    assert ours.keys() == exact.keys()
    for name, result in ours.items():
        hidden = exact[name].isneginf()
        assert torch.equal(result.isneginf(), hidden), name
        if name[2:] in tensors:
            assert (result.dtype, result.shape) == (tensors[name[2:]].dtype, tensors[name[2:]].shape), name
        values = (x.masked_fill(hidden, 0) for x in (result, exact[name], eager[name]))
        assert_within_bound(*values, dtype, name=name, summands=summands if name.startswith("d_") else 0.0)


def expected(
    tensors: Tensors, dtype: torch.dtype, d_out: Tensor, d_lse: Tensor, visible: Tensor, own: Tensor, **options: Any
) -> Tensors:
    """The same by the formula, in dtype; vectors of the logits are at least fp32."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {
        name: x.to(dtype if name in "qkv" else wide).requires_grad_() for name, x in tensors.items()
    }
    operands = {name: x.to(wide) if dtype == HALF else x for name, x in leaves.items()}
    found = by_formula(operands, visible, own, **{"scale": 0.3, **options})
    lse = torch.where(found.lse.isneginf(), 0, found.lse)
    loss = (found.out * d_out.to(found.out.dtype)).sum() + (lse * d_lse).sum()
    of_leaves = torch.autograd.grad(loss, list(leaves.values()))
    named = found._replace(out=found.out.to(dtype))._asdict()
    return {name: x.detach() for name, x in named.items()} | {f"d_{x}": g for x, g in zip(leaves, of_leaves, strict=True)}


def of_mask(name: str, device: torch.device, sizes: tuple[int, int, int, int], kv_heads: int):
    """A `Visibility` by one of MASKS, its visible pairs, and the keys at which rows stand."""
    batch, heads, q_len, k_len = sizes
    arguments = harness.mask(name, device, *sizes)
    shapes = torch.Size((batch, heads, q_len, 1)), torch.Size((batch, kv_heads, k_len, 1))
    pairs = visible_pairs(sizes, **MASKS[name](*sizes)).to(device)
    own = torch.arange(q_len, device=device)[None] + k_len - q_len
    return Visibility.of_shapes(*shapes, device, **arguments), pairs, own


@pytest.mark.usefixtures("small_tiles")
@in_turn(
    mask=MASKS,
    form=["relative", "dense", "both", "row of tables"],
    dtype=[SINGLE, HALF, SINGLE],
    softcap=[None, (1.5, False), (1.5, True)],
    scales=[("query_scale",), ("query_scale", "key_scale"), ("query_scale", "key_bias", "sinks"), ()],
    heads=[(2, 1), (1, 2), (1, 3)],
)
def test_every_mask(mask, form, dtype, softcap, scales, heads, device):
    (kv_heads, group), (q_len, k_len) = heads, (21, 35)
    sizes = (2, kv_heads * group, q_len, k_len)
    shapes = {
        "relative": (None, (2, sizes[1], q_len, 50)),
        "dense": (sizes, None),
        "both": ((1, sizes[1], q_len, 1), (2, 1, 1, 13)),
        "row of tables": (None, (1, sizes[1], 1, 20)),
    }
    tensors = harness.inputs(dtype, device, kv_heads=kv_heads, group=group, scales=scales, q_len=q_len, k_len=k_len)
    tensors = with_biases(tensors, dtype, *shapes[form])
    options = {"relative_right": 7 if form != "dense" else 0}
    if softcap is not None:
        options |= dict(zip(("softcap", "bias_after_softcap"), softcap, strict=True))
    check(tensors, *of_mask(mask, device, sizes, kv_heads), **options)
