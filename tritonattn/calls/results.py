"""The statistics of rows that a public call returns with its output."""

from __future__ import annotations

from typing import NamedTuple, cast

from torch import Tensor
from torch.autograd import forward_ad

from ..core.autograd import in_forward_mode
from ..core.call import ForwardResult


class AttentionAux(NamedTuple):
    """The softmax of each row before dropout and sinks: [B, Hq, Sq], fp32 (fp64 for fp64 q), natural log.

    lse         ln sum_j exp(logit[i, j]) over the visible keys, after softcap
    max_logit   max_j logit[i, j], before softcap (but with the biases if they are added after it)
    entropy     -sum_j p[i, j] ln p[i, j], after softcap

    A row without keys has lse = max_logit = -inf and entropy 0.

    All three are differentiable, with z the logits after softcap:

        d lse[i]     / d z[i, j] = p[i, j]
        d entropy[i] / d z[i, j] = -p[i, j] (z[i, j] - lse[i] + entropy[i])

    and the gradient of max_logit goes to the lowest key with the maximum. A row without keys has no gradient. max_logit
    and entropy have no derivatives beyond the first: their gradients of gradients raise NotImplementedError, and in
    forward mode (jvp) so does access to them. backend="reference" has both. Under batch_invariant the gradient of
    max_logit raises NotImplementedError.

    >>> import torch, tritonattn
    >>> q, k, v = torch.randn(3, 1, 4, 16, 8)
    >>> out, aux = tritonattn.attention(q, k, v, causal=True, return_aux=True)
    >>> bool(aux.entropy[0, :, 0].abs().max() < 1e-6)  # the first row attends to one key
    True

    An entropy of at least 1 nat a row as a regulariser:

    >>> q = q.clone().requires_grad_()
    >>> _, aux = tritonattn.attention(q, k, v, return_aux=True)
    >>> torch.relu(1 - aux.entropy).mean().backward()
    >>> q.grad.shape
    torch.Size([1, 4, 16, 8])
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


class LseInForwardMode(AttentionAux):
    """The `AttentionAux` whose lse alone has a tangent: max_logit and entropy raise; as a tuple, None."""

    __slots__ = ()

    @property
    def max_logit(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise _no_tangent("max_logit")

    @property
    def entropy(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise _no_tangent("entropy")


def _no_tangent(name: str) -> NotImplementedError:
    return NotImplementedError(f'{name}: no forward-mode derivatives (jvp) here; backend="reference" has them')


def _lse_alone(name: str) -> NotImplementedError:
    return NotImplementedError(f"{name}: backend 'flash' gives lse alone; backends 'triton', 'sdpa' and 'reference' do")


def aux_of(result: ForwardResult, by_formulas: bool = False) -> AttentionAux:
    """The `AttentionAux` of a result that was computed with aux. by_formulas: torch gives all of it a tangent."""
    result_type = AttentionAux if result.entropy is not None else LseAlone
    if in_forward_mode() and not by_formulas and forward_ad.unpack_dual(result.lse).tangent is not None:
        return LseInForwardMode(result.lse, cast(Tensor, None), cast(Tensor, None))
    return result_type(result.lse, cast(Tensor, result.max_logit), cast(Tensor, result.entropy))
