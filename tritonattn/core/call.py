"""Attention as it was asked for, as a backend takes it, and the results of a backend's passes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dropout import Dropout
from .eight_bit import EIGHT_BIT, Descale, of_keys, times
from .pair_biases import reflected, relative_pairs
from .sequences import PageTable, Slots
from .terms import Terms, rolled_keys
from .visibility import Visibility

LONGEST_QUERY = 16  # rows of a call over a KV cache


class Request(NamedTuple):
    """Attention as it was asked for, over the keys of a visibility.

    A public function makes it of its arguments, `calls.checks.check` returns one that holds to their types and
    shapes, and `calls.dispatch.run` makes an `AttentionCall` of that.

    q, k, v, visibility, block_table    as of `AttentionCall`
    terms      the terms that were given: the scaling's are missing
    scaling    a `Scaling`, or what stands for one until `check`
    gain       multiplies its factor: a float, a tensor broadcastable to [B, Hq, Sq], or None
    dropout_p  the chance to drop a probability
    aux        max_logit and entropy are results too
    backend    its name, or "auto"
    cached     the function, in errors, if k and v are a KV cache: the call has then no gradients; else ""
    statistics of the keys, kept with a cache, or None
    k_descale, v_descale    of `core.eight_bit`, by which k and v of 8 bits are multiplied; None is 1
    """

    q: Tensor
    k: Tensor
    v: Tensor
    visibility: Visibility
    terms: Terms
    scaling: Any = None
    gain: Any = None
    dropout_p: float = 0.0
    aux: bool = False
    backend: str = "auto"
    block_table: Tensor | None = None
    cached: str = ""
    statistics: Any = None
    k_descale: Descale | None = None
    v_descale: Descale | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors that may have a gradient, in the order of `Gradients`; the scaling's and gain's are missing."""
        return self.q, self.k, self.v, *self.terms.tensors()

    def changed(self, **fields: Any) -> Request:
        """Replace fields, as `Terms.changed`."""
        unchanged: dict[str, Any] = dict(zip(Request._fields, self, strict=True))
        return Request(**(unchanged | fields))

    def gathered(self) -> Request:
        """The request without pages and 8-bit numbers: k and v along the axis of keys, dequantised."""
        if self.block_table is None and self.k.dtype != EIGHT_BIT:
            return self
        return self.changed(k=self.keys(), v=self.values(), block_table=None, k_descale=None, v_descale=None)

    def keys(self) -> Tensor:
        """The keys [B, Hkv, Sk, D], a copy where they lie in pages, with zeros behind the last key of a sequence.

        Of 8-bit keys a copy too: what they stand for, in fp32 (fp64 for fp64 q).
        """
        return self._dequantised(self.k, self.k_descale)

    def values(self) -> Tensor:
        """The values [B, Hkv, Sk, Dv], likewise."""
        return self._dequantised(self.v, self.v_descale)

    def _dequantised(self, x: Tensor, descale: Descale | None) -> Tensor:
        (found,) = _along_keys(self.block_table, self.visibility, x)
        if x.dtype != EIGHT_BIT:
            return found
        wide = found.to(torch.promote_types(self.q.dtype, torch.float32))
        return times(wide, None if descale is None else of_keys(descale, self.visibility))


class AttentionCall(NamedTuple):
    """A call as a backend takes it: the softmax of logits of `terms` over the visible keys, times v.

    q, k, v    [B, Hq, Sq, D], [B, Hkv, Sk, D], [B, Hkv, Sk, Dv]; any strides; one dtype, in which the output is, or
               8-bit k and v of a cache, whose output is of `eight_bit.dtype_of_sums`, before v's descale
    dropout    on the probabilities, after the softmax
    backend    its name
    aux        max_logit and entropy are results too
    cached     k and v are a KV cache: there are no gradients
    block_table   int32 [N, max_pages] or None: k and v are then pages [P, Hkv, page, D or Dv], and key j of batch
               entry or sequence n of `visibility.sequences` lies in page block_table[n, j // page], at j % page.
               Vectors of keys still lie along the axis of visibility.k_len. Entries outside [0, P) are not followed:
               keys and values there are zeros. No gradients.
    is_part    rows attend to other keys too: out and lse, which a backward gets, are of all of them

    Gradients by other ways, as through key norms, are added to an fp32 gradient before the sum is rounded. For the
    same end q and k may hold 16-bit values in fp32 with a 16-bit v.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    visibility: Visibility
    terms: Terms
    dropout: Dropout | None = None
    backend: str = "sdpa"
    aux: bool = False
    cached: bool = False
    block_table: Tensor | None = None
    is_part: bool = False

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors that may have a gradient, in the order of `Gradients`."""
        return self.q, self.k, self.v, *self.terms.tensors()

    def changed(self, **fields: Any) -> AttentionCall:
        """Replace fields, as `Terms.changed`."""
        unchanged: dict[str, Any] = dict(zip(AttentionCall._fields, self, strict=True))
        return AttentionCall(**(unchanged | fields))

    def narrowed(self) -> AttentionCall:
        """The call with q and k in v's dtype."""
        dtype = self.v.dtype
        if self.q.dtype == self.k.dtype == dtype or self.v.dtype == EIGHT_BIT:
            return self
        return self.changed(q=self.q.to(dtype), k=self.k.to(dtype))

    def gathered(self) -> AttentionCall:
        """The call without pages: k and v along the axis of keys."""
        if self.block_table is None:
            return self
        k, v = _along_keys(self.block_table, self.visibility, self.k, self.v)
        return self.changed(k=k, v=v, block_table=None)

    def from_keys(self, first: Tensor) -> AttentionCall:
        """The call with keys counted from first[b] of each entry, int64 [B], as `Visibility.from_keys` has them.

        Blocks of keys are then those of a call with only these keys.
        A `bias` has all entries and keys, and there is no relative one.
        """
        terms = self.terms._replace(**rolled_keys(first, **self.terms.by_name()))
        visible = self.visibility.from_keys(first)
        return self.changed(**rolled_keys(first, k=self.k, v=self.v), terms=terms, visibility=visible)

    def by_ranges(self) -> AttentionCall:
        """The call with its visible keys as key_ranges, where their few rows stand at the end of a cache.

        Ranges do not say where rows stand: a relative bias becomes one of pairs, and a relative scale a table of rows.
        """
        visible, terms = self.visibility, self.terms
        ranges = visible.as_ranges()
        if terms.relative_bias is not None:
            pairs = relative_pairs(terms.relative_bias, terms.relative_right, visible)
            pairs = pairs.expand(visible.batch, -1, -1, -1)
            pairs = pairs if terms.bias is None else pairs + terms.bias
            terms = terms._replace(bias=pairs, relative_bias=None)
        right = 0
        if terms.relative_scale is not None:
            factors = relative_pairs(terms.relative_scale, terms.relative_right, visible, 1.0)
            right = visible.q_len - 1
            entries = slice(0, visible.k_len + right)
            terms = terms._replace(relative_scale=reflected(factors, ranges.positions() + right, entries, fill=1.0))
        return self.changed(visibility=ranges, terms=terms._replace(relative_right=right))


def _along_keys(block_table: Tensor | None, visibility: Visibility, *cached: Tensor) -> tuple[Tensor, ...]:
    """Tensors [P, H, page, C] of pages along the axis of keys, as `Request.keys` says; without pages as they are."""
    if block_table is None:
        return cached
    sequences, lengths, pages = visibility.sequences, visibility.key_lengths, cached[0]
    table = PageTable(block_table, pages.shape[2], sequences)
    key = torch.arange(visibility.k_len, device=pages.device)[None]
    end = visibility.k_len if sequences is None else sequences.k_starts[-1]
    end = end if lengths is None else lengths[:, None]
    slots = table.find(torch.where(key < end, key, -1), pages.shape[0])
    return tuple([_at(slots, x) for x in cached])


def _at(slots: Slots, x: Tensor) -> Tensor:
    if x.dtype == EIGHT_BIT:  # torch selects among bytes everywhere; byte 0 is 0
        return _at(slots, x.view(torch.uint8)).view(x.dtype)
    return slots.of(x.transpose(1, 2)).transpose(1, 2)


class ForwardResult(NamedTuple):
    """out [B, Hq, Sq, Dv] in `eight_bit.dtype_of_sums`; lse, max_logit, entropy [B, Hq, Sq], fp32 (fp64 for fp64 q).

    Logarithms are natural. max_logit and entropy are None unless asked for, and so is lse where a library computes the
    output.
    """

    out: Tensor
    lse: Tensor
    max_logit: Tensor | None = None
    entropy: Tensor | None = None


class RowGradients(NamedTuple):
    """Gradients of the statistics of rows, [B, Hq, Sq] with any strides; None for zero.

    entropies   the entropies themselves, where `entropy`, their gradient, is there
    """

    lse: Tensor | None = None
    max_logit: Tensor | None = None
    entropy: Tensor | None = None
    entropies: Tensor | None = None
