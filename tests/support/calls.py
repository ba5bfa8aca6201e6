"""Operands of attention, and calls at the level of the operators."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import tritonattn
from tritonattn.core.call import AttentionCall
from tritonattn.core.dropout import Dropout
from tritonattn.core.norms import key_norms_of
from tritonattn.core.ranges import argmax_over_ranges, prefix_sum
from tritonattn.core.sequences import Sequences
from tritonattn.core.terms import Terms
from tritonattn.core.visibility import Visibility

from .packed import offsets

# A mode for each way to a factor: a constant, counts, positions, sums, squares in fp64, maxima, both scales.
TYPICAL = ("dim", "log_key_count", "llama4", "key_norm_mean", "key_norm_rms", "key_norm_max", "cosine")


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
    "bias": {"bias": True, "causal": True, "softcap": 2.0},
    "biases of pairs": {"pairs": (2, 4), "window": (3, 1)},
    "biases after softcap": {"pairs": (1, 1), "bias": True, "causal": True, "softcap": 2.0},
    "distances": {"distances": True, "causal": True, "softcap": 2.0},
    "distances biases": {"distances": True, "pairs": (2, 4), "bias": True, "window": (3, 1)},
    "dropout": {"dropout": True},
    "packed": {"sequences": ((3, 0, 1), (2, 1, 3)), "causal": True},
    "packed sinks dropout": {"sequences": ((1, 4), (5, 2)), "sinks": True, "dropout": True},
}


def changed(call: AttentionCall, **fields: Any) -> AttentionCall:
    """The call with other values of some of its fields, those of its logits among them."""
    of_logits = {name: fields.pop(name) for name in Terms._fields if name in fields}
    return call.changed(terms=call.terms._replace(**of_logits), **fields)


def example(
    scales: bool = True,
    softcap: float | None = None,
    sinks: bool = False,
    dropout: bool = False,
    bias: bool = False,
    pairs: tuple[int, int] | None = None,
    distances: bool = False,
    sequences: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    dims: tuple[int, int] = (8, 6),
    **masks,
) -> AttentionCall:
    """A float64 call of a fixed seed whose every tensor asks for a gradient.

    sequences are lengths in rows and keys, dims (D, Dv), pairs batch entries and heads of biases of pairs, of which the
    relative one has a row for each of several entries, and which with a softcap are added after it; distances: there is
    a relative scale too, without pairs one row for all
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
    key_bias, sink_logits = leaf(batch, 2, 2, 7) if bias else None, leaf(batch, 4, 5) if sinks else None
    logits = Terms(0.3, query_scale, key_scale, key_bias, sink_logits, softcap=softcap)
    if pairs is not None:
        of_pairs = {"bias": leaf(*pairs, 5, 7), "relative_bias": leaf(*pairs, 5 if pairs[0] > 1 else 1, 4)}
        logits = logits._replace(**of_pairs, relative_right=1, bias_after_softcap=softcap is not None)
    if distances:
        logits = logits._replace(relative_scale=leaf(*(1, 1, 1) if pairs is None else (*pairs, 5), 4), relative_right=1)
    drop = Dropout(0.3, torch.tensor([3, 4])) if dropout else None
    return AttentionCall(q, k, v, Visibility.of(q, k, **masks), logits, drop, backend="sdpa")


def torch_kernels() -> SimpleNamespace:
    """The kernels that `tritonattn.ops.statistics` calls, by torch."""
    return SimpleNamespace(
        key_norms=lambda k, counted: key_norms_of(k, counted).detach(),
        prefix_sums=prefix_sum,
        argmax_over_ranges=argmax_over_ranges,
        seen_keys=Visibility.seen_keys,
        key_norms_backward=_key_norms_backward,
    )


def _key_norms_backward(k, counted, norms, d_norms, added=None):
    rate = torch.where(norms > 0, d_norms / norms.clamp(min=1e-30), 0)
    d_k = torch.where((norms > 0)[..., None], rate[..., None] * k, 0)
    return (d_k if added is None else d_k + added).to(k.dtype).contiguous()


def assert_extreme_sink(sink: float, backend: str, device: torch.device | str = "cpu") -> None:
    """-inf is no sink, +inf gives zeros, NaN gives NaN in rows that attend to keys; rows without keys give zeros."""
    q, k, v = (x.detach().float().to(device).requires_grad_() for x in operands().values())
    ranges = torch.tensor([[0, 0], [0, 3], [1, 4], [0, 7], [2, 2]], device=device).expand(2, 5, 2).int()
    of_values = []

    def results(sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        out = tritonattn.attention(q, k, v, sinks=sinks, key_ranges=ranges, backend=backend)
        d_q, d_v = torch.autograd.grad(out.sum(), (q, v))
        of_values.append(d_v[:, 0])  # of the key head that the first two query heads read
        return out.detach(), d_q

    _assert_third_sink(sink, results, (ranges[..., 0] < ranges[..., 1])[:, None, :, None])
    assert torch.equal(of_values[0], of_values[1])


def assert_extreme_sink_of_decode(sink: float, backend: str, keys: int, device: torch.device | str = "cpu") -> None:
    """As `assert_extreme_sink`, of a cache for `keys` keys: full in one sequence, empty in the other."""
    q, k, v = (x.detach().float().to(device) for x in operands(lengths=(1, keys)).values())
    lengths = torch.tensor([keys, 0], device=device)

    def results(sinks: Tensor | None) -> tuple[Tensor]:
        return (tritonattn.attention_decode(q, k, v, key_lengths=lengths, sinks=sinks, backend=backend),)

    _assert_third_sink(sink, results, (lengths > 0)[:, None, None, None])


def _assert_third_sink(sink: float, results: Callable[[Tensor | None], tuple[Tensor, ...]], attends: Tensor) -> None:
    """`sink` changes the results [B, Hq, Sq, ...] of the third of four heads alone; attends [B, 1, Sq, 1]."""
    found, finite = (results(torch.tensor([0.0, 1.0, one, 2.0], device=attends.device)) for one in (sink, 0.0))
    for x, same, without in zip(found, finite, results(None), strict=True):
        assert torch.equal(x[:, [0, 1, 3]], same[:, [0, 1, 3]])
        assert (x.masked_fill(attends, 0) == 0).all()
        if sink == torch.inf:
            assert (x[:, 2] == 0).all()
        elif sink == -torch.inf:
            torch.testing.assert_close(x[:, 2], without[:, 2])
        else:
            assert x[:, 2:3].isnan().logical_or(~attends).all()


def assert_gradients_of_keys_add_up(
    backend: str, device: torch.device | str = "cpu", softcap: float | None = None, tolerance: float = 1e-3
) -> None:
    """Through logits the gradient is 84,000, which fp16 has not, and through key norms nearly as much less."""
    axes = torch.eye(16, device=device)
    k = 1e-4 * torch.stack([axes[0] + axes[1] / 10, axes[1] / 10 - axes[0]])
    operands = (axes[:1] + axes[1:2] / 2, k, torch.stack([axes[0], -axes[0]]), 40 * axes[:1])
    q, k, v, d_out = (x[None, None].half() for x in operands)

    def gradients(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = tritonattn.attention(*leaves, scaling="key_norm_mean", softcap=softcap, backend=backend)
        return torch.autograd.grad(out, leaves, d_out.to(dtype))

    for found, exact in zip(gradients(torch.float16, backend), gradients(torch.float64, "reference"), strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())
