"""One attention call, from a public function to a backend, and the results of a backend's passes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dropout import Dropout
from .pair_biases import relative_pairs
from .ranges import rolled
from .sequences import PageTable
from .visibility import Visibility

LONGEST_QUERY = 16  # rows of a call over a KV cache


class Logits(NamedTuple):
    """The terms of a logit, and the softmax's others.

        logit[i, j] = scale * (q[i] . k[j]) * query_scale[i] * key_scale[j] + key_bias[j] + bias[i, j] + relative[i, j]

    query_scale   [B, Hq, Sq] or None, fp32 (fp64 for fp64 q); any strides, 0 included
    key_scale     [B, Hkv, Sk] or None, likewise
    key_bias      [B, Hkv, Hq / Hkv, Sk] or None, likewise; a key with -inf has no weight, whatever the softcap
    softcap       c: logit -> c * tanh(logit / c), or None
    sinks         [B, Hq, Sq] or None, likewise: a logit of each row in the softmax's denominator only, neither scaled
                  nor capped
    bias          each axis of [B, Hq, Sq, Sk] or 1, or None; of any dtype but that fp64 is for fp64 q; any strides
    relative_bias [B or 1, Hq or 1, Sq or 1, extent] or None, likewise: relative[i, j] is the entry of row i at
                  position[i] - j + relative_right, and 0 outside of the extent; `Visibility.positions`
    relative_right    entries that belong to keys after the row's position
    bias_after_softcap    the three biases are added to the capped logit

    In a user's call the scaling gives the scales, and may add to the biases.
    """

    scale: float = 1.0
    query_scale: Tensor | None = None
    key_scale: Tensor | None = None
    key_bias: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    relative_bias: Tensor | None = None
    relative_right: int = 0
    bias_after_softcap: bool = False

    def changed(self, **terms: Any) -> Logits:
        """Replace fields as `_replace` does, which torch.compile traces only from torch 2.9 on."""
        unchanged: dict[str, Any] = dict(zip(Logits._fields, self, strict=True))
        return Logits(**(unchanged | terms))


@dataclass(eq=False)
class AttentionCall:
    """The softmax of `logits` over the visible keys, times v.

    A public function makes it of its arguments, `calls.checks.check` holds these to their types and shapes,
    and `calls.dispatch.run` computes the terms of its logits and hands it to a backend.

    q, k, v    [B, Hq, Sq, D], [B, Hkv, Sk, D], [B, Hkv, Sk, Dv]; any strides; one dtype, in which the output is
    dropout    on the probabilities, after the softmax
    wide_q     fp32 of q's shape, or None: stands for q in the graph and takes its gradient in fp32; its values are not
               read, and it may have no memory
    wide_k     likewise k's
    is_part    rows attend to other keys too: out and lse, which a backward gets, are of all of them
    block_table   int32 [N, max_pages] or None: k and v are then pages [P, Hkv, page, D or Dv], and key j of batch
               entry or sequence n of `visibility.sequences` lies in page block_table[n, j // page], at j % page.
               Vectors of keys still lie along the axis of visibility.k_len. Entries outside [0, P) are not followed:
               keys and values there are zeros. No gradients.
    scaling    a `Scaling`, or what stands for one until `check`
    gain       multiplies its factor: a float, a tensor broadcastable to [B, Hq, Sq], or None
    dropout_p  the chance to drop, of which `run` draws `dropout`
    aux        max_logit and entropy are results too
    backend    its name, or "auto"
    cached     the function, in errors, if k and v are a KV cache: the call has then no gradients; else ""
    record     the statistics of the keys that are kept with a cache, or None

    Gradients by other ways, as through key norms, are added to an fp32 gradient before the sum is rounded. For the
    same end q and k may hold 16-bit values in fp32 with a 16-bit v.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    visibility: Visibility
    logits: Logits
    dropout: Dropout | None = None
    wide_q: Tensor | None = None
    wide_k: Tensor | None = None
    is_part: bool = False
    block_table: Tensor | None = None
    scaling: Any = None
    gain: float | Tensor | None = None
    dropout_p: float = 0.0
    aux: bool = False
    backend: str = "auto"
    cached: str = ""
    record: Any = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors that may have a gradient, in the order of `Gradients`."""
        terms = self.logits
        q = self.q if self.wide_q is None else self.wide_q
        k = self.k if self.wide_k is None else self.wide_k
        vectors = (terms.query_scale, terms.key_scale, terms.key_bias, terms.sinks)
        return q, k, self.v, *vectors, terms.bias, terms.relative_bias

    def narrowed(self) -> AttentionCall:
        """The call with q and k in v's dtype."""
        dtype = self.v.dtype
        if self.q.dtype == self.k.dtype == dtype:
            return self
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype))

    def gathered(self) -> AttentionCall:
        """The call without pages: k and v along the axis of keys."""
        if self.block_table is None:
            return self
        return replace(self, k=self.keys(), v=self.values(), block_table=None)

    def from_keys(self, first: Tensor) -> AttentionCall:
        """The call with keys counted from first[b] of each entry, int64 [B], as `Visibility.from_keys` has them.

        Blocks of keys are then those of a call with only these keys. `wide_q` and `wide_k` stay: no value is read.
        A `bias` has all entries and keys, and there is no relative one.
        """
        terms = self.logits
        vectors = _rolled(first, key_scale=terms.key_scale, key_bias=terms.key_bias, bias=terms.bias)
        logits = terms._replace(**vectors)
        visible = self.visibility.from_keys(first)
        return replace(self, **_rolled(first, k=self.k, v=self.v), logits=logits, visibility=visible)

    def by_ranges(self) -> AttentionCall:
        """The call with its visible keys as key_ranges, where their few rows stand at the end of a cache.

        Ranges do not say where rows stand: a relative bias becomes one of pairs.
        """
        visible, terms = self.visibility, self.logits
        if terms.relative_bias is not None:
            pairs = relative_pairs(terms.relative_bias, terms.relative_right, visible)
            pairs = pairs.expand(visible.batch, -1, -1, -1)
            pairs = pairs if terms.bias is None else pairs + terms.bias
            terms = terms._replace(bias=pairs, relative_bias=None, relative_right=0)
        return replace(self, visibility=visible.as_ranges(), logits=terms)

    def keys(self) -> Tensor:
        """The keys [B, Hkv, Sk, D], a copy where they lie in pages, with zeros behind the last key of a sequence."""
        return self._along_keys(self.k)

    def values(self) -> Tensor:
        """The values [B, Hkv, Sk, Dv], likewise."""
        return self._along_keys(self.v)

    def _along_keys(self, x: Tensor) -> Tensor:
        if self.block_table is None:
            return x
        sequences, lengths = self.visibility.sequences, self.visibility.key_lengths
        table = PageTable(self.block_table, x.shape[2], sequences)
        key = torch.arange(self.visibility.k_len, device=x.device)[None]
        end = self.visibility.k_len if sequences is None else sequences.k_starts[-1]
        end = end if lengths is None else lengths[:, None]
        return table.find(torch.where(key < end, key, -1), x.shape[0]).of(x.transpose(1, 2)).transpose(1, 2)


def sinks_of_heads(sinks: Tensor) -> Tensor | None:
    """The sinks [Hq] of a call whose rows share one a head, which their strides say; None where rows have their own."""
    shares = all(sinks.shape[axis] == 1 or sinks.stride(axis) == 0 for axis in (0, 2))
    return sinks[0, :, 0] if shares else None


def per_group(bias: Tensor, visibility: Visibility) -> Tensor:
    """A bias as [B, Hkv, Hq / Hkv, Sk], from one with a row a query head or a row a key head."""
    batch, kv_heads, k_len = visibility.keys
    group = visibility.q_heads // max(kv_heads, 1)
    if bias.dim() > 1:
        by_key_head = bias.shape[-2] in (1, kv_heads)
        bias = bias.unsqueeze(-2) if by_key_head else bias.unflatten(-2, (kv_heads, group))
    return bias.expand(batch, kv_heads, group, k_len)


class ForwardResult(NamedTuple):
    """out [B, Hq, Sq, Dv] in v's dtype; lse, max_logit, entropy [B, Hq, Sq], fp32 (fp64 for fp64 q), natural log.

    max_logit and entropy are None unless asked for.
    """

    out: Tensor
    lse: Tensor
    max_logit: Tensor | None = None
    entropy: Tensor | None = None


class Needs(NamedTuple):
    """The tensors of an AttentionCall whose gradients are asked for."""

    q: bool = False
    k: bool = False
    v: bool = False
    query_scale: bool = False
    key_scale: bool = False
    key_bias: bool = False
    sinks: bool = False
    bias: bool = False
    relative_bias: bool = False


class Gradients(NamedTuple):
    """Gradients of an AttentionCall's tensors; None for those not asked for."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    query_scale: Tensor | None = None
    key_scale: Tensor | None = None
    key_bias: Tensor | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    relative_bias: Tensor | None = None

    def rolled(self, first: Tensor) -> Gradients:
        """The gradients by keys counted from first[b] of each entry, int64 [B]; the keys before it come last."""
        of_keys = {"k": self.k, "v": self.v, "key_scale": self.key_scale, "key_bias": self.key_bias, "bias": self.bias}
        return self._replace(**_rolled(first, **of_keys))


_AXES_OF_KEYS = {"k": 2, "v": 2, "key_scale": 2, "key_bias": 3, "bias": 3}


def _rolled(first: Tensor, **tensors: Tensor | None) -> dict[str, Any]:
    return {name: None if x is None else rolled(x, first, _AXES_OF_KEYS[name]) for name, x in tensors.items()}
