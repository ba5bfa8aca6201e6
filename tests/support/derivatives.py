"""Tangents of a call and their gradients: by a backend's passes, and by torch through the dense reference."""

import torch
from torch import Tensor

from tests.support.calls import changed
from tritonattn.backends import BACKENDS, reference
from tritonattn.backends.protocol import SecondOrder
from tritonattn.core.call import AttentionCall, ForwardResult
from tritonattn.core.terms import PAIRS, Gradients, Needs

Tensors = dict[str, Tensor]
OPERANDS = ("q", "k", "v")


def tensors_of(call: AttentionCall) -> Tensors:
    """The call's tensors that may have a gradient, detached."""
    pairs = zip(Gradients._fields, call.tensors(), strict=True)
    return {name: x.detach() for name, x in pairs if x is not None}


def in_dtype(call: AttentionCall, dtype: torch.dtype) -> AttentionCall:
    """The call with operands and biases of pairs in a dtype, and the other terms in the one that stands beside it."""
    wide = torch.promote_types(dtype, torch.float32)
    narrow = (*OPERANDS, *PAIRS)
    return changed(call, **{name: x.to(dtype if name in narrow else wide) for name, x in tensors_of(call).items()})


def directions(call: AttentionCall, seed: int = 1) -> tuple[Gradients, Tensor, Tensor]:
    """Random tangents of all tensors of a call, and random gradients of the tangents of out and lse."""
    random = torch.Generator().manual_seed(seed)

    def like(x: Tensor, *shape: int) -> Tensor:
        return torch.randn(shape or x.shape, generator=random, dtype=torch.float64).to(x.dtype)

    tangents = {name: like(x) for name, x in tensors_of(call).items()}
    rows, wide = call.q.shape[:3], torch.promote_types(call.q.dtype, torch.float32)
    return Gradients(**tangents), like(call.v, *rows, call.v.shape[3]), like(call.q.to(wide), *rows)


def by_passes(
    call: AttentionCall,
    tangents: Gradients,
    d_out: Tensor,
    d_lse: Tensor | None,
    needs: Needs | None = None,
    needs_tangents: Needs | None = None,
) -> Tensors:
    """The tangents "out" and "lse", and the gradients "q" ... towards tensors and "dot q" ... towards tangents."""
    backend, every = BACKENDS[call.backend], Needs(*(x is not None for x in call.tensors()))
    rounding = torch.empty_like(d_out, dtype=torch.int8) if d_out.dtype.itemsize == 2 else None
    with torch.no_grad():
        result = backend.forward(call, rounding, has_graph=True)
        saved = result.out, result.lse, rounding
        out, lse = backend.tangent(call, saved, tangents)
        asked = (every if one is None else one for one in (needs, needs_tangents))
        *found, _ = backend.second(call, saved, SecondOrder(tangents, d_out, d_lse, *asked))
    named = {"out": out, "lse": lse}
    for prefix, gradients in zip(("", "dot "), found, strict=True):
        named |= {prefix + name: x for name, x in gradients._asdict().items() if x is not None}
    return named


def by_autograd(
    call: AttentionCall, tangents: Gradients, d_out: Tensor, d_lse: Tensor | None, dtype: torch.dtype = torch.float64
) -> Tensors:
    """The same of the dense reference, by torch: in a dtype."""
    call = in_dtype(call, dtype)
    primals = {name: x.requires_grad_() for name, x in tensors_of(call).items()}
    along = {
        name: (torch.zeros_like(x) if (given := getattr(tangents, name)) is None else given.to(x)).requires_grad_()
        for name, x in primals.items()
    }

    def dense(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return by_reference(changed(call, **dict(zip(primals, tensors, strict=True))))

    (_, lse), (out, mean), *_ = torch.func.jvp(dense, tuple(primals.values()), tuple(along.values()))
    mean = torch.where(lse == -torch.inf, 0, mean)
    d_results = d_out.to(out), torch.zeros_like(mean) if d_lse is None else d_lse.to(mean)
    leaves = {**primals, **{f"dot {name}": x for name, x in along.items()}}
    found = torch.autograd.grad((out, mean), tuple(leaves.values()), d_results, materialize_grads=True)
    return {"out": out.detach(), "lse": mean.detach(), **dict(zip(leaves, found, strict=True))}


def by_reference(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """out and lse of the dense reference, differentiable by torch."""
    return results_of_reference(call)[:2]


def results_of_reference(call: AttentionCall) -> ForwardResult:
    """The results of the dense reference, differentiable by torch."""
    terms, visible = call.terms, call.visibility
    group = visible.q_heads // visible.kv_heads
    factor = torch.tensor(terms.scale, dtype=torch.float64)
    if terms.query_scale is not None:
        factor = factor * terms.query_scale[..., None]
    if terms.key_scale is not None:
        factor = factor * terms.key_scale.repeat_interleave(group, dim=1)[:, :, None]
    if terms.key_bias is not None:
        terms = terms.changed(key_bias=terms.key_bias.flatten(1, 2))
    return reference.attention(call.q, call.k, call.v, factor, visible, terms=terms, dropout=call.dropout)
