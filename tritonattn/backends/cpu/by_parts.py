"""Attention on a CPU by PyTorch's kernel, a part of the visible pairs at a time: memory O(S D), backward included.

The kernel is the one behind torch.nn.functional.scaled_dot_product_attention. It adds a mask to the logits and returns
lse, and its backward takes out and lse: a part needs no more than its rows and keys. Both operators are private;
tests/backends/test_by_parts.py holds what is relied on.

With share_i = exp(lse_i) / (exp(lse_i) + exp(sink)), a sink leaves share_i out_i. The gradients are then those of the
kernel for share_i d_out_i, given the out that a sink left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.call import AttentionCall, ForwardResult
from ...core.eight_bit import EIGHT_BIT
from ...core.pair_biases import reflected
from ...core.private_names import private
from ...core.rounding import before_rounding, lost_in_rounding
from ...core.terms import Gradients, Needs, addends, has_any, others_than
from ...core.visibility import Visibility
from .parts import Part, Parts, additive, by_entry, cut_rows, unstacked
from .tiles import sliced
from .torch_kernel import SHARES_KEY_HEADS, folds_rows, for_kernel, is_widened, stays_finite

_forward: Any = private("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu", None)
_backward: Any = private("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward", None)

# Sequences with a larger lse, or one below its negative, take tiles. A probability exp(logit - lse) of a backward,
# which computes the logits again, is off by eps times their size; the kernel also rounds scales into q and k.
_LARGEST_LSE = 64.0

# The terms that the kernel does not have.
_OTHERS = others_than("query_scale", "key_scale", "key_bias", "sinks", "bias", "relative_bias", "relative_right")


class Prepared(NamedTuple):
    """A call as the kernel takes it, and rows [B, Sq] of sequences that it leaves to tiles, or None for none."""

    call: AttentionCall
    spoiled: Tensor | None = None


def takes(call: AttentionCall) -> bool:
    """True where the kernel exists, and has all terms and dtypes of the call."""
    if _forward is None or _backward is None or has_any(call.terms, _OTHERS):
        return False
    is_other = call.visibility.invariant or call.dropout is not None or call.k.dtype == EIGHT_BIT
    return not is_other and call.k.is_cpu


def is_sound(call: AttentionCall, parts: Parts, found: ForwardResult) -> bool:
    """True where the kernel was right for the operands of the call, as its results show.

    It adds -inf to hidden logits, which leaves NaN, and its maximum skips NaN among few keys, whose lse is then 0.
    """
    sizes, has_mask = found.lse.abs(), _has_mask(call)
    least, most = map(float, sizes.aminmax())
    if most == math.inf and (has_mask or not parts.has_all_rows):
        least, most = map(float, sizes.masked_fill_(found.lse == -torch.inf, 1).aminmax())  # rows without keys
    if not (least > 0 and most <= _LARGEST_LSE):
        return False
    return not (has_mask or parts.meets_hidden) or math.isfinite(found.out.sum(dtype=found.lse.dtype))


def prepared(call: AttentionCall, parts: Parts, needs: Needs | None = None) -> Prepared | None:
    """The call as the kernel takes it for its output, or for gradients; None where it cannot honour something.

    Where operands hold NaN or infinity, zeros stand for keys that no row attends to, for rows without keys, and for the
    packed sequences that hold them; the rest must be finite.
    """
    visible, terms = call.visibility, call.terms
    of_scales = needs is not None and not (terms.query_scale is None and terms.key_scale is None)
    if of_scales:  # they meet the gradients of operands, 0 or not
        of_scales = not (visible.every_row_attends and visible.attends_to_every_key)
    if not (of_scales or parts.meets_hidden or _has_mask(call)) or stays_finite(call, call.v):
        return Prepared(call)
    call = _with_zeros(call, ~visible.attending_rows(), ~visible.seen_keys())
    if stays_finite(call, call.v):
        return Prepared(call)
    if visible.sequences is None:
        return None
    rows, keys = _spoiled(call)
    call = _with_zeros(call, rows[:, None], keys[:, None])
    return Prepared(call, rows) if stays_finite(call, call.v) else None


def _with_zeros(call: AttentionCall, rows: Tensor, keys: Tensor) -> AttentionCall:
    """The call with zeros for these rows [B or 1, 1 or Hq, Sq] and keys [B or 1, 1 or Hkv, Sk]."""

    def zeroed(x: Tensor | None, hidden: Tensor) -> Any:
        return None if x is None else x.masked_fill(hidden if x.dim() == 3 else hidden[..., None], 0)

    terms = call.terms
    terms = terms.changed(query_scale=zeroed(terms.query_scale, rows), key_scale=zeroed(terms.key_scale, keys))
    q, k, v = zeroed(call.q, rows), zeroed(call.k, keys), zeroed(call.v, keys)
    return call.changed(q=q, k=k, v=v, terms=terms)


def _spoiled(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Rows [1, Sq] and keys [1, Sk] of the packed sequences that hold NaN or infinity."""
    terms, visible, found = call.terms, call.visibility, []
    assert visible.sequences is not None
    rows = visible.sequences.sequence_of_rows(visible.q_len)
    keys, _ = visible.sequences.position_of_keys(torch.arange(visible.k_len))
    for sequence, operands in ((rows, (call.q, terms.query_scale)), (keys, (call.k, call.v, terms.key_scale))):
        for x in operands:
            if x is not None:
                is_finite = x.isfinite().flatten(3).all(-1) if x.dim() == 4 else x.isfinite()  # [1, H, S]
                found.append(sequence[~is_finite.all(1)[0]])
    bad = torch.cat(found)
    return torch.isin(rows, bad)[None], torch.isin(keys, bad)[None]


def may_join(call: AttentionCall, is_wide: bool) -> bool:
    """True where parts of a row can be joined, as `parts_of` has it; is_wide as `_Operands` has it."""
    return not _has_mask(call) and (is_wide or call.v.dtype.itemsize > 2)


def _has_mask(call: AttentionCall) -> bool:
    return call.visibility.mask is not None or _has_bias(call)


def _has_bias(call: AttentionCall) -> bool:
    terms = call.terms
    return bool(addends(terms))


def rows_of_tiles(lse: Tensor, visible: Visibility, spoiled: Tensor | None) -> Tensor | None:
    """Rows of sequences that the kernel does not serve, bool [B, Hq, Sq], or None where there is none.

    They are spoiled, as of `Prepared`, or their logits are too large for it.
    """
    sizes = lse.abs()
    if spoiled is None and bool(sizes.amax() <= _LARGEST_LSE):
        return None
    steep = (sizes > _LARGEST_LSE) & (lse > -torch.inf)
    if spoiled is None and not bool(steep.any()):
        return None
    rows = steep.any(1)  # [B, Sq]
    if visible.sequences is None:
        rows = rows.any(-1, keepdim=True)
    else:
        sequence = visible.sequences.sequence_of_rows(visible.q_len)
        rows = torch.isin(sequence, sequence[rows[0]])[None]
    rows = rows if spoiled is None else rows | spoiled
    return rows[:, None].expand_as(steep)


def forward(call: AttentionCall, parts: Parts, rounding: Tensor | None, has_graph: bool) -> ForwardResult:
    """Compute the output and lse of a call that it `takes`; rounding and has_graph as `Backend.forward` has them.

    They hold for operands as of `prepared`.
    """
    operands = _Operands(call, parts, rounding is not None, has_graph)
    every = operands.parts()
    if parts.has_all_rows and len(every) == 1:
        out, lse = (every[0].joined(x) for x in operands.attend(every[0]))
    else:
        batch, heads, rows = call.q.shape[:3]  # laid out as the kernel's results: by rows, then heads
        out = operands.v.new_empty(batch, rows, heads, call.v.shape[3]).transpose(1, 2)
        lse = call.q.new_empty(batch, rows, heads, dtype=operands.dtype).transpose(1, 2)
        if not parts.has_all_rows:
            out.zero_()
            lse.fill_(-torch.inf)
        for part in every:
            _put(part.of_rows(out), part.of_rows(lse), *operands.attend(part), part.joins)
    if call.terms.sinks is not None:
        out = out * torch.sigmoid(_above_sinks(lse, call.terms.sinks))[..., None].to(out.dtype)
    exact, out = out, out.to(call.v.dtype)
    if rounding is not None:
        rounding.copy_(lost_in_rounding(exact, out))
    return ForwardResult(out, lse)


def backward(
    call: AttentionCall,
    parts: Parts,
    saved: tuple[Tensor, Tensor, Tensor | None],
    d_out: Tensor,
    needs: Needs,
) -> Gradients:
    """Compute the gradients that `needs` asks for, none of a bias, as `backward_pass.backward` does without d_lse.

    call    as of `prepared`
    saved   out, lse and rounding
    """
    operands, terms, (out, lse, rounding) = _Operands(call, parts, is_wide=True, has_graph=True), call.terms, saved
    out = out.to(operands.dtype) if rounding is None else before_rounding(out, rounding)
    gap = None if terms.sinks is None else _above_sinks(lse, terms.sinks)
    d_out, blind = d_out.to(operands.dtype), lse == -torch.inf
    if bool(blind.any()):
        d_out, lse = d_out.masked_fill(blind[..., None], 0), lse.masked_fill(blind, torch.inf)
    found: dict[str, Tensor] = {}
    if gap is not None:
        found["sinks"] = -(torch.sigmoid(-gap) * torch.linalg.vecdot(out, d_out))
        d_out = d_out * torch.sigmoid(gap)[..., None]
    found["q"], found["k"], found["v"] = operands.gradients(out, lse, d_out)
    for name, x, scale in (("q", call.q, terms.query_scale), ("k", call.k, terms.key_scale)):
        scaled = found[name]
        if scale is not None:
            found["query_scale" if name == "q" else "key_scale"] = torch.linalg.vecdot(scaled, x.to(scaled.dtype))
            scaled.mul_(scale[..., None])
    pairs = zip(Gradients._fields, call.tensors(), needs, strict=True)
    return Gradients(*(found[name].to(x.dtype) if need and x is not None else None for name, x, need in pairs))


def _put(out: Tensor, lse: Tensor, found: Tensor, found_lse: Tensor, joins: bool) -> None:
    """Write what a part has found for its rows, or join it with what a part before it has."""
    if joins:
        out.lerp_(found, torch.sigmoid(found_lse - lse)[..., None])
        torch.logaddexp(lse, found_lse, out=lse)
    else:
        out.copy_(found)
        lse.copy_(found_lse)


def _above_sinks(lse: Tensor, sinks: Tensor) -> Tensor:
    """lse less the sink of each row, [B, Hq, Sq]; 0 for rows without keys."""
    return (lse - sinks).masked_fill(lse == -torch.inf, 0)


class _Operands:
    """The operands of the kernel: one head dim for all, with scales folded into q and k, in one dtype.

    scale    a power of two where q is in `dtype` and a backward comes. By another the kernel multiplies logits in its
             forward and operands in its backward, whose exp(logit - lse) then errs ten times as much
    factor   the rest of the call's scale, in q, with its sign: the kernel hides keys by -inf before it multiplies
    dtype    of lse and masks: fp32, or fp64 for fp64 q
    """

    def __init__(self, call: AttentionCall, parts: Parts, is_wide: bool, has_graph: bool) -> None:
        terms, q, k, v = call.terms, call.q, call.k, call.v
        self.call, self.of_call, self.has_mask = call, parts, _has_mask(call)
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        is_scaled = terms.query_scale is not None or terms.key_scale is not None
        if v.dtype != self.dtype and (is_wide or is_scaled or not q.dtype == k.dtype == v.dtype):
            q, k, v = (x.to(self.dtype) for x in (q, k, v))
        is_exact = has_graph and q.dtype == self.dtype
        self.scale = math.ldexp(1.0, math.frexp(terms.scale)[1] - 1) if is_exact else abs(terms.scale) or 1.0
        self.factor = terms.scale / self.scale
        if terms.query_scale is not None:
            q = q * (terms.query_scale if self.factor == 1 else terms.query_scale * self.factor)[..., None]
        elif self.factor != 1:
            q = q * self.factor
        if terms.key_scale is not None:
            k = k * terms.key_scale[..., None]
        self.widens = is_widened(q, 1 if self.has_mask else q.shape[1] // max(k.shape[1], 1))
        width = max(q.shape[-1], v.shape[-1])
        self.q, self.k, self.v = for_kernel(q, width), for_kernel(k, width), for_kernel(v, width)

    def parts(self) -> Sequence[Part]:
        """The parts of the call, of one entry where it widens, of fewer rows where a mask of theirs has to be made."""
        every = self.of_call.every
        if self.widens:
            every = [one for part in every for one in by_entry(part)]
        if not self.has_mask:
            return every
        terms, mask = self.call.terms, self.call.visibility.mask
        tensors = [x for x in (mask, terms.bias, terms.relative_bias) if x is not None]
        # The kernel adds its mask to what a triangle hides, so that NaN and infinity would stay there.
        with_triangle = terms.key_bias is not None and not tensors and bool(terms.key_bias.amax() < torch.inf)
        has_bias_alone = len(tensors) == 1 and tensors[0] is terms.bias and terms.key_bias is None
        # The kernel wants the keys of its mask side by side, and q's dtype: else a copy of all pairs.
        is_taken = has_bias_alone and tensors[0].dtype == self.q.dtype
        with_rectangle = not tensors or (is_taken and tensors[0].shape[-1] > 1 and tensors[0].stride(-1) == 1)
        taken = {"causal": with_triangle, "full": with_rectangle, "ranges": False}
        masks = max([x.shape[0] * x.shape[1] for x in tensors], default=1)
        single = [one for part in every for one in unstacked(part)]
        return [cut for one in single for cut in ([one] if taken[one.form] else cut_rows(one, masks))]

    def attend(self, part: Part) -> tuple[Tensor, Tensor]:
        """out [N, Hq, rows, Dv] and lse [N, Hq, rows] of a part."""
        q, (k, v), mask = part.of_rows(self.q), self._keys_and_values(part), self._mask(part)
        if self.widens:
            q, k, v = (x.to(self.dtype) for x in (q, k, v))
            mask = None if mask is None else mask.to(self.dtype)
        group, shape = q.shape[1] // k.shape[1], q.shape[:3]
        folds = mask is None and part.form == "full" and folds_rows(q, group)
        if folds:
            q = q.unflatten(1, (-1, group)).flatten(2, 3)
        out, lse = _forward(q, k, v, 0.0, part.form == "causal", attn_mask=mask, scale=self.scale)
        if out.shape[-1] > self.call.v.shape[-1]:
            out = out[..., : self.call.v.shape[-1]]
        if folds:
            out, lse = out.reshape(*shape, -1), lse.reshape(shape)
        # The kernel's lse of a row without keys, or of one with NaN in its mask, is 0 or NaN.
        if mask is None or bool(lse.abs().amin() > 0):
            return out, lse
        suspects = ~(lse.abs() > 0)
        largest = self._largest(part, mask, suspects)
        blind, spoiled = suspects & (largest == -torch.inf), suspects & largest.isnan()
        out = out.masked_fill(blind[..., None], 0).masked_fill(spoiled[..., None], torch.nan)
        return out, lse.masked_fill(blind, -torch.inf).masked_fill(spoiled, torch.nan)

    def gradients(self, out: Tensor, lse: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the gradients of q times its scale, of k times its scale, and of v.

        out and d_out [B, Hq, Sq, Dv], lse [B, Hq, Sq] with inf for rows without keys
        """
        width, (q_width, value_width) = self.q.shape[-1], (self.call.q.shape[-1], self.call.v.shape[-1])
        query, lone, kept = self.q, self._lone_rows(lse), None
        if lone is not None:  # their softmax is 1, whatever the logit: that of 0 gives no rounding to k
            kept = (~lone)[..., None].to(query.dtype)
            query = query * kept
            lse = lse.masked_fill(lone, -torch.inf if _has_bias(self.call) else 0)
        of_rows = (for_kernel(d_out, width), query, for_kernel(out, width), lse)
        every = self.parts()
        has_all_rows, splits_keys = self.of_call.has_all_rows, self.of_call.splits_keys
        if len(every) == 1 and has_all_rows and splits_keys:
            d_q, d_k, d_v = (every[0].joined(x) for x in self._gradients(every[0], *of_rows))
        else:
            splits_keys = splits_keys and every is self.of_call.every
            d_q = torch.empty_like(self.q) if has_all_rows else torch.zeros_like(self.q)
            d_k, d_v = ((torch.empty_like if splits_keys else torch.zeros_like)(x) for x in (self.k, self.v))
            for part in every:
                of_query, *of_keys = self._gradients(part, *of_rows)
                rows = part.of_rows(d_q)
                rows.add_(of_query) if part.joins else rows.copy_(of_query)
                for whole, found in zip((d_k, d_v), of_keys, strict=True):
                    if splits_keys:
                        part.of_keys(whole).copy_(found)
                    else:
                        part.add_to_keys(whole, found)
        if kept is not None:
            d_q.mul_(kept)
        d_q = d_q[..., :q_width]
        return d_q if self.factor == 1 else d_q.mul_(self.factor), d_k[..., :q_width], d_v[..., :value_width]

    def _gradients(self, part: Part, *of_rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d_out, q, out, lse = (part.of_rows(x) for x in of_rows)
        k, v = self._keys_and_values(part)
        mask = self._mask(part)
        if mask is not None and _has_bias(self.call) and bool((lone := lse == -torch.inf).any()):
            lse = torch.where(lone, self._largest(part, mask, lone), lse)
        settings = {"attn_mask": mask, "scale": self.scale}
        d_q, d_k, d_v = _backward(d_out, q, k, v, out, lse, 0.0, part.form == "causal", **settings)
        if k.shape[1] != self.k.shape[1]:
            d_k, d_v = (x.unflatten(1, (self.k.shape[1], -1)).sum(2) for x in (d_k, d_v))
        return d_q, d_k, d_v

    def _keys_and_values(self, part: Part) -> tuple[Tensor, Tensor]:
        k, v = part.of_keys(self.k), part.of_keys(self.v)
        group = self.q.shape[1] // k.shape[1]
        if SHARES_KEY_HEADS or group == 1:
            return k, v
        return k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)

    def _mask(self, part: Part) -> Tensor | None:
        """The biases of a part, -inf for hidden pairs: each axis of [N, Hq, rows, keys] or 1; None for none."""
        if not self.has_mask:
            return self.of_call.mask(part, self.dtype) if part.form == "ranges" else None
        visible, terms, batch, rows, keys = self.call.visibility, self.call.terms, part.batch, part.rows, part.keys
        every, total = slice(None), None
        if terms.key_bias is not None:
            total = terms.key_bias[batch, :, :, keys].flatten(1, 2)[:, :, None]
        if terms.bias is not None:
            pairs = sliced(terms.bias, batch, every, rows, keys)
            pairs = pairs if pairs.dtype == self.q.dtype else pairs.to(self.dtype)
            total = pairs if total is None else total + pairs
        if terms.relative_bias is not None:
            offset = sliced(visible.positions() + terms.relative_right, batch, rows)
            pairs = reflected(sliced(terms.relative_bias, batch, every, rows), offset, keys).to(self.dtype)
            total = pairs if total is None else total + pairs
        seen = None if visible.mask is None else sliced(visible.mask, batch, every, rows, keys)
        if part.form == "ranges":
            inside = self.of_call.inside(part)
            seen = inside if seen is None else seen & inside
        if seen is not None:
            total = additive(seen, self.dtype) if total is None else total.masked_fill(~seen, -torch.inf)
        if total is None:
            return None
        total = total.expand(-1, -1, part.height, part.width)
        return total if total.stride(-1) == 1 else total.contiguous()

    @staticmethod
    def _largest(part: Part, mask: Tensor, wanted: Tensor) -> Tensor:
        """The largest bias of the visible pairs of each of the wanted rows, bool [N, Hq, rows]; 0 for others."""
        rows = wanted.flatten(0, 1).any(0).nonzero()[:, 0]
        visible = mask[:, :, rows]
        if part.form == "causal":
            visible = visible.masked_fill(torch.arange(part.width, device="cpu") > rows[:, None], -torch.inf)
        largest = torch.zeros(wanted.shape, dtype=mask.dtype, device="cpu")
        largest[:, :, rows] = visible.amax(-1)
        return largest

    def _lone_rows(self, lse: Tensor) -> Tensor | None:
        """Rows of one key, bool [B, Hq, Sq], or None where there is none; a bias can hide the one key."""
        visible, lone = self.call.visibility, self.of_call.lone
        if self.call.is_part or self.call.terms.sinks is not None:
            return None
        if visible.mask is not None:
            lone = visible.counts() == 1
        if lone is None or not bool((lone := lone & (lse < torch.inf)).any()):
            return None
        return lone
