"""Operands of attention, and calls at the level of the operators."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tritonattn.core.call import AttentionCall, Logits
from tritonattn.core.dropout import Dropout
from tritonattn.core.sequences import Sequences
from tritonattn.core.visibility import Visibility

from .packed import offsets


def operands(dtype=torch.float64, batch=2, heads=(4, 2), lengths=(5, 7), dims=(8, 6), seed=0) -> dict[str, Tensor]:
    """q, k and v of a fixed seed that ask for gradients; heads (Hq, Hkv), lengths (Sq, Sk), dims (D, Dv)."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return {
        "q": leaf(batch, heads[0], lengths[0], dims[0]),
        "k": leaf(batch, heads[1], lengths[1], dims[0]),
        "v": leaf(batch, heads[1], lengths[1], dims[1]),
    }


# Everything that changes what an operator gets: (B, Hq, Hkv, Sq, Sk, D, Dv) = (2, 4, 2, 5, 7, 8, 6); packed, B is 1.
CALLS: dict[str, dict] = {
    "plain": {"scales": False},
    "causal scales": {"causal": True},
    "window lengths": {"window": (2, 1), "key_lengths": torch.tensor([3, 7])},
    "ranges": {"key_ranges": torch.tensor([[1, 4], [0, 7], [5, 5], [2, 3], [0, 1]]).expand(2, 5, 2).int()},
    "mask sinks": {"mask": torch.ones(2, 1, 5, 7).bool().tril(1), "sinks": True},
    "softcap": {"softcap": 2.0, "causal": True},
    "dropout": {"dropout": True},
    "packed": {"sequences": ((3, 0, 1), (2, 1, 3)), "causal": True},
    "packed sinks dropout": {"sequences": ((1, 4), (5, 2)), "sinks": True, "dropout": True},
}


def changed(call: AttentionCall, **fields: Any) -> AttentionCall:
    """The call with other values of some of its fields, those of its logits among them."""
    of_logits = {name: fields.pop(name) for name in Logits._fields if name in fields}
    return replace(call, logits=call.logits._replace(**of_logits), **fields)


def example(
    scales: bool = True,
    softcap: float | None = None,
    sinks: bool = False,
    dropout: bool = False,
    sequences: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    dims: tuple[int, int] = (8, 6),
    **masks,
) -> AttentionCall:
    """A float64 call of a fixed seed whose every tensor asks for a gradient.

    sequences are lengths in rows and keys, dims (D, Dv)
    """
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    batch = 2
    if sequences is not None:
        batch, (q_lengths, k_lengths) = 1, sequences
        masks["sequences"] = Sequences(offsets(q_lengths), offsets(k_lengths), max(q_lengths), max(k_lengths))
    q, k, v = leaf(batch, 4, 5, dims[0]), leaf(batch, 2, 7, dims[0]), leaf(batch, 2, 7, dims[1])
    query_scale, key_scale = (leaf(batch, 4, 5), leaf(batch, 2, 7)) if scales else (None, None)
    return AttentionCall(
        q,
        k,
        v,
        Visibility.of(q, k, **masks),
        Logits(0.3, query_scale, key_scale, softcap, leaf(4) if sinks else None),
        Dropout(0.3, torch.tensor([3, 4])) if dropout else None,
    )
