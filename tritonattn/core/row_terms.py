"""Biases of keys that count from each row's position: the row's part of them, which cancels in the softmax alone."""

from __future__ import annotations

from torch import Tensor

from .terms import Terms, per_group
from .visibility import Visibility

# An attribute of a tensor: tracing keeps and guards attributes, and not subclasses.
_MARK = "_tritonattn_counts_from_rows"


def counted_from_rows(key_bias: Tensor) -> Tensor:
    """Mark a bias of keys as one that counts from the row's position: a view of it for `key_bias=`.

        logit[i, j] = ... + key_bias[j] - key_bias[p(i)]          p(i): the position of row i, as `causal` counts it

    as of ALiBi, whose bias is m j and whose term is m (j - p(i)), and of all running sums. A call leaves out
    key_bias[p(i)], which cancels in the softmax; it does not with sinks, to each of which the call then adds it, and in
    a softcap, which it refuses unless `bias_after_softcap`. `nn.ALiBi` and `nn.ForgetGate` mark their biases.

    An operation on a marked tensor gives one without a mark: mark a sum of two, or a buffer of a cache, again.

    Args:
        key_bias: As of `tritonattn.attention`, with an entry for every key; a gradient passes. Rows that attend to keys
            stand at one, as causal rows do.

    Raises:
        TypeError: A value that is not a tensor.

    >>> import torch, tritonattn
    >>> q, k, v = torch.randn(3, 1, 4, 16, 8)
    >>> bias = tritonattn.nn.counted_from_rows(torch.arange(16)[None] / 8)
    >>> tritonattn.attention(q, k, v, causal=True, key_bias=bias, sinks=torch.zeros(4)).shape
    torch.Size([1, 4, 16, 8])
    """
    if not isinstance(key_bias, Tensor):
        raise TypeError(f"key_bias: expected a tensor, got {type(key_bias).__name__}")
    marked = key_bias.view_as(key_bias)
    setattr(marked, _MARK, True)
    return marked


def is_counted_from_rows(key_bias: Tensor) -> bool:
    return getattr(key_bias, _MARK, False)


def as_marked(key_bias: Tensor, source: Tensor) -> Tensor:
    """A part of `source`, marked if that is."""
    return counted_from_rows(key_bias) if is_counted_from_rows(source) else key_bias


def sinks_beside(
    key_bias: Tensor, terms: Terms, visibility: Visibility, positions: Tensor | None = None
) -> Tensor | None:
    """The sinks of a call next to one of its biases of keys.

    terms       with sinks of rows, [B, Hq, Sq], or None
    positions   of rows among the keys, int64 [1, Sq]; None: those of `visibility`

    Raises NotImplementedError for a bias that counts from rows before a softcap.
    """
    if not is_counted_from_rows(key_bias):
        return terms.sinks
    if terms.softcap is not None and not terms.bias_after_softcap:
        raise NotImplementedError(
            "softcap: not supported over a key_bias that counts from rows, as of ALiBi and ForgetGate, since a row's"
            " part of it does not cancel in tanh; attention(bias_after_softcap=True) is, and ALiBi as a relative_bias"
        )
    if terms.sinks is None:
        return None
    batch, heads, rows = visibility.rows
    of_heads = per_group(key_bias.to(terms.sinks.dtype), visibility).flatten(1, 2)  # [B, Hq, Sk]
    positions = visibility.positions() if positions is None else positions
    index = positions.clamp(0, max(visibility.k_len - 1, 0))[:, None].expand(batch, heads, rows)
    return terms.sinks + of_heads.gather(-1, index)
