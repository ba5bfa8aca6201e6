"""Biases for `key_bias=` and `relative_bias=`: ALiBi and forget gates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..calls.checks import check_bool, check_count, check_dtype, check_tensor, shape_of
from ..core.ranges import prefix_sum
from ..core.row_terms import counted_from_rows
from ..core.torch_distributed import SharesSequence, refuse_context_parallel


class ALiBi(SharesSequence, nn.Module):
    """bias[h, j] = m_h * (j - (keys - 1)): attention with linear biases.

    The paper adds m_h * (j - i) to the logit of row i and key j. A term of the row alone cancels in the softmax, so
    that one number per key is enough; lse and max_logit shift by it. With sinks it does not cancel: the bias is one
    that is `counted_from_rows`, and a call adds the term to its sinks. The slopes m_h are 2^(-8 h / n) for h = 1 .. n
    where the number of heads n is a power of two; else those of the power below, then every second one of twice that
    power.

    Numbers near -m_h * keys are rounded to float32: differences of logits are off by at most m_h * keys * 2^-23, 0.002
    for the steepest slope among 2^15 keys.

    Where rows attend to keys on both sides, the paper's term becomes -m_h * |i - j|, a bias of the distance:
    relative[h, t] = -m_h * |t| for the key t positions before the row.

    Args:
        heads: Hq.
        bidirectional: Return the bias of distances.
        device: The device of the bias; it moves with the module.

    Calling it with a number of keys returns the bias, float32 [heads, keys]: pass it with any scaling, and under a
    softcap with `bias_after_softcap=True`. In decoding the number is the cache's capacity. Under
    `tritonattn.distributed.ContextParallel` the number is that of this rank's keys, and their bias counts positions in
    the whole sequence. A bidirectional one returns float32 [1, heads, 1, 2 * keys - 1]: pass it as `relative_bias`,
    with `relative_right=keys - 1`; causal calls take it too, sinks and a softcap of either order included.

    >>> import torch, tritonattn
    >>> q, k, v = torch.randn(3, 1, 4, 16, 8)
    >>> alibi = tritonattn.nn.ALiBi(heads=4)
    >>> tritonattn.attention(q, k, v, causal=True, key_bias=alibi(16), scaling="key_norm_mean").shape
    torch.Size([1, 4, 16, 8])
    >>> alibi = tritonattn.nn.ALiBi(heads=4, bidirectional=True)
    >>> tritonattn.attention(q, k, v, relative_bias=alibi(16), relative_right=15).shape
    torch.Size([1, 4, 16, 8])

    Source: Press et al. 2022, "Train short, test long", arXiv:2108.12409.

    Raises:
        TypeError, ValueError: An invalid number of heads or keys.
        NotImplementedError: In a call: torch's context_parallel; a bidirectional one under `ContextParallel`.
    """

    bidirectional: bool = False  # of a pickle that has none
    _place: Tensor  # of no entries; it moves with the module

    def __init__(self, heads: int, *, bidirectional: bool = False, device: torch.device | str | None = None) -> None:
        super().__init__()
        check_count("heads", heads, 1)
        check_bool("bidirectional", bidirectional)
        self.heads, self.bidirectional = heads, bidirectional
        self.register_buffer("_place", torch.empty(0, device=device), persistent=False)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, bidirectional={self.bidirectional}"

    @property
    def slopes(self) -> Tensor:
        """m_h: float32 [heads]."""
        return self._exact_slopes().float()

    def forward(self, keys: int) -> Tensor:
        check_count("keys", keys, int(self.bidirectional))
        refuse_context_parallel("ALiBi")
        if self.bidirectional:
            return self._of_distances(keys)
        ranks = 1 if self.sequence_part is None else self.sequence_part.ranks
        distance = self._positions(keys, self._place.device).double() - (keys * ranks - 1)
        return counted_from_rows((self._exact_slopes()[:, None] * distance).float())

    def _of_distances(self, keys: int) -> Tensor:
        if self.sequence_part is not None:
            raise NotImplementedError("ALiBi: expected bidirectional=False under ContextParallel, got True")
        distance = torch.arange(1 - keys, keys, dtype=torch.float64, device=self._place.device).abs()
        return (-self._exact_slopes()[:, None] * distance).float()[None, :, None]

    def _exact_slopes(self) -> Tensor:
        """Computed at each use: values in a buffer would be rounded by `to(torch.bfloat16)` and lost by `to_empty`."""
        below = 1 << (self.heads.bit_length() - 1)
        h = torch.arange(1, self.heads + 1, dtype=torch.float64, device=self._place.device)
        return torch.exp2(torch.where(h <= below, -8 * h, -8 * (h - below) + 4) / below)


class ForgetGate(SharesSequence, nn.Module):
    """bias[h, j] = -sum of ln f_h(x_l) over l <= j, f_h = sigmoid(proj(x)_h): the forgetting transformer's gates.

    The paper adds the sum of ln f over j < l <= i to the logit of row i and key j. That is c_i - c_j with
    c_i = sum of ln f over l <= i; c_i cancels in the softmax of row i, so that -c_j is enough; lse and max_logit shift
    by c_i. For the same reason the sums of packed sequences need not begin again. With sinks c_i does not cancel: the
    bias is one that is `counted_from_rows`, and a call adds its term to the sinks.

    Args:
        width: Features of x.
        heads: Hq.
        bias: Give the projection a bias.
        device, dtype: The device and dtype of the projection.

    Calling it with x [B, S, width], or packed [T, width], returns float32 [B, heads, S] or [heads, T] (float64 of
    float64): pass it as `key_bias` to a causal call, under a softcap with `bias_after_softcap=True`. In decoding
    `before` [B, heads] is the bias of the last token, and the bias of all tokens stands in a buffer with the cache:
    `counted_from_rows(buffer)` where there are sinks.

    Sums are float64, and their rounding to float32 puts logits off by at most 2^-23 of the sum. Under
    `tritonattn.distributed.ContextParallel` x holds this rank's tokens, and sums begin at the whole sequence's first.

    >>> import torch, tritonattn
    >>> gate, x = tritonattn.nn.ForgetGate(32, heads=4), torch.randn(2, 10, 32)
    >>> layer = tritonattn.nn.ScaledAttention(32, heads=4, causal=True)
    >>> layer(x, key_bias=gate(x)).shape
    torch.Size([2, 10, 32])

    Source: Lin et al. 2025, "Forgetting Transformer: Softmax Attention with a Forget Gate", arXiv:2503.02130.

    Raises:
        TypeError, ValueError: An invalid size, dtype or shape.
        NotImplementedError: In a call: torch's context_parallel.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("width", width, 1)
        check_count("heads", heads, 1)
        check_bool("bias", bias)
        check_dtype(dtype)
        self.proj = nn.Linear(width, heads, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        check_tensor("x", x, "[..., S, width]")
        if x.dim() < 2 or x.shape[-1] != self.proj.in_features:
            raise ValueError(f"x: expected [..., S, width = {self.proj.in_features}], got {shape_of(x)}")
        refuse_context_parallel("ForgetGate")
        gates = self.proj(x).mT  # [..., heads, S]
        if before is not None:
            check_tensor("before", before, "[..., heads]")
            if before.shape != gates.shape[:-1]:
                raise ValueError(f"before: expected [..., heads] = {shape_of(gates)[:-1]}, got {shape_of(before)}")
        dtype = torch.promote_types(gates.dtype, torch.float32)
        log_gates = nn.functional.logsigmoid(gates.to(dtype))
        part = self.sequence_part
        sums = prefix_sum(log_gates)[..., 1:] if part is None else part.running_sum(log_gates)
        return counted_from_rows((-sums if before is None else before.double()[..., None] - sums).to(dtype))
