"""The statistics of rows that a public call returns with its output."""

from __future__ import annotations

from typing import NamedTuple, cast

from torch import Tensor

from ..core.call import ForwardResult


class AttentionAux(NamedTuple):
    """The softmax of each row before dropout and sinks: [B, Hq, Sq], fp32 (fp64 for fp64 q), natural log.

    lse         ln sum_j exp(logit[i, j]) over the visible keys, after softcap; differentiable
    max_logit   max_j logit[i, j], before softcap (but with the biases if they are added after it); not differentiable
    entropy     -sum_j p[i, j] ln p[i, j], after softcap; not differentiable

    A row without keys has lse = max_logit = -inf and entropy 0.

    >>> import torch, tritonattn
    >>> q, k, v = torch.randn(3, 1, 4, 16, 8)
    >>> out, aux = tritonattn.attention(q, k, v, causal=True, return_aux=True)
    >>> bool(aux.entropy[0, :, 0].abs().max() < 1e-6)  # the first row attends to one key
    True
    """

    lse: Tensor
    max_logit: Tensor
    entropy: Tensor


class LseAlone(AttentionAux):
    """The `AttentionAux` of backend "flash": max_logit and entropy raise NotImplementedError; as a tuple, None."""

    __slots__ = ()

    @property
    def max_logit(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise _lse_alone("max_logit")

    @property
    def entropy(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise _lse_alone("entropy")


def _lse_alone(name: str) -> NotImplementedError:
    return NotImplementedError(f"{name}: backend 'flash' gives lse alone; backends 'triton', 'sdpa' and 'reference' do")


def aux_of(result: ForwardResult) -> AttentionAux:
    """The `AttentionAux` of a result that was computed with aux."""
    result_type = AttentionAux if result.entropy is not None else LseAlone
    return result_type(result.lse, cast(Tensor, result.max_logit), cast(Tensor, result.entropy))
