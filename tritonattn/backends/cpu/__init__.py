"""Attention on a CPU for every mask and option; memory O(S D), backward included. A call takes the first way that fits:

    way                      calls                                      reason
    few_rows.attention       bf16 rows that would widen their keys,     a lone row reads keys once: to widen them takes
                             as of steps over caches of one length      longer than its products
    torch_kernel.attention   all keys, or a square's lower triangle,    PyTorch's kernel with PyTorch's gradient
                             and no other term; steps over caches of
                             one length
    few_keys.attention       a bias of pairs with a gradient, all of    the kernel gives it none; tiles multiply once
                             few keys                                   more than where the softmax is kept
    by_parts                 the others without softcap, dropout and    PyTorch's kernel, on parts that hide nothing or
                             batch_invariant; sequences with lse <= 64   under a mask
    forward_pass,            all; return_aux; gradients of biases       tiles in plain torch: the kernel gives neither
    backward_pass            and of the statistics of rows              dP nor P
    tangent_pass,            derivatives beyond the first, after any    the kernel has none
    second_pass

A tile is some query rows against some keys, for a few heads. Tiles without a visible pair are skipped; tiles in which
every pair is visible are not masked. Operands are widened to fp32 (fp64 stays) a tile at a time and nothing
is rounded in between, P included: the result of a 16-bit call is rounded once.

With x = scale * (q . k) * query_scale * key_scale + biases and z = x, or softcap * tanh(x / softcap):

    s       = exp(z - lse)
    share_i = exp(lse_i) / (exp(lse_i) + exp(sinks_i))      1 without sinks
    keep_ij = kept_ij / (1 - p)                             1 without dropout
    out_i   = share_i sum_j keep_ij s_ij v_j
    delta_i = out_i . d_out_i
    dz_ij   = s_ij (share_i keep_ij (d_out_i . v_j) - share_i delta_i + d_lse_i - d_entropy_i (ln s_ij + entropy_i))
    dx_ij   = dz_ij (1 - (z_ij / softcap)^2)                dz_ij without softcap
    d_sinks_i = -(1 - share_i) delta_i
    d_bias_ij = dx_ij                                   dz_ij where biases are added after the softcap

The gradient of a scale is that of the scaled operand before it meets the scale, times the operand: nothing is
divided by a scale."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.autograd import without_autocast
from ...core.call import AttentionCall, ForwardResult, RowGradients
from ...core.terms import ADDENDS, Gradients, Needs
from ..protocol import Backend, SecondOrder
from . import backward_pass, by_parts, forward_pass, second_pass, tangent_pass, torch_kernel
from .parts import parts_of


class Sdpa(Backend):
    """PyTorch's kernel with its gradient for plain calls, and tiles of ours for the others."""

    name = "sdpa"
    attention = staticmethod(torch_kernel.attention)

    def follows_lengths(self, device: torch.device) -> str | None:
        return f"backend 'sdpa' on {device}, whose products follow the lengths" if device.type == "cuda" else None

    def forward(self, call: AttentionCall, rounding: Tensor | None = None, has_graph: bool = True) -> ForwardResult:
        takes = by_parts.takes(call) and not call.aux
        return _by_parts(call, rounding, has_graph) if takes else forward_pass.forward(call, rounding)

    def backward(
        self,
        call: AttentionCall,
        saved: tuple[Tensor, Tensor, Tensor | None],
        d_out: Tensor,
        d_rows: RowGradients,
        needs: Needs,
    ) -> Gradients:
        with without_autocast(call.q):
            return _backward(call, saved, d_out, d_rows, needs)

    def tangent(
        self, call: AttentionCall, saved: tuple[Tensor, Tensor, Tensor | None], tangents: Gradients
    ) -> tuple[Tensor, Tensor]:
        _, lse, _ = saved
        with without_autocast(call.q):
            return tangent_pass.tangent(call, lse, tangents)

    def second(
        self, call: AttentionCall, saved: tuple[Tensor, Tensor, Tensor | None], asked: SecondOrder
    ) -> tuple[Gradients, Gradients, tuple[Tensor, Tensor] | None]:
        _, lse, _ = saved
        along = self.tangent(call, saved, asked.tangents) if asked.is_along else None
        with without_autocast(call.q):
            return *second_pass.second(call, lse, asked), along


def _backward(
    call: AttentionCall,
    saved: tuple[Tensor, Tensor, Tensor | None],
    d_out: Tensor,
    d_rows: RowGradients,
    needs: Needs,
) -> Gradients:
    out, lse, rounding = saved
    of_rows = d_rows.lse is not None or d_rows.entropy is not None
    needs_tiles = of_rows or any(getattr(needs, name) for name in ADDENDS)
    if needs_tiles or not by_parts.takes(call):
        return backward_pass.backward(call, out, lse, d_out, d_rows, needs, rounding)
    parts = parts_of(call.visibility, by_parts.may_join(call, is_wide=True))
    prepared = by_parts.prepared(call, parts, needs)
    if prepared is None:
        return backward_pass.backward(call, out, lse, d_out, d_rows, needs, rounding)
    rows = by_parts.rows_of_tiles(lse, call.visibility, prepared.spoiled)
    if rows is None:
        return by_parts.backward(prepared.call, parts, saved, d_out, needs)
    # A row with an lse of -inf has no gradient: each way leaves the other's rows out, and what they find adds up.
    of_rest = out, lse.masked_fill(rows, -torch.inf), rounding
    of_parts = by_parts.backward(prepared.call, parts, of_rest, d_out, needs)
    of_tiles = backward_pass.backward(call, out, lse.masked_fill(~rows, -torch.inf), d_out, d_rows, needs, rounding)
    pairs = zip(of_parts, of_tiles, strict=True)
    return Gradients(*(None if x is None or y is None else x + y for x, y in pairs))


def _by_parts(call: AttentionCall, rounding: Tensor | None, has_graph: bool) -> ForwardResult:
    """The result by parts where it is sound, with rows by tiles where it is not."""
    parts = parts_of(call.visibility, by_parts.may_join(call, rounding is not None))
    found = by_parts.forward(call, parts, rounding, has_graph)
    if by_parts.is_sound(call, parts, found):
        return found
    prepared = by_parts.prepared(call, parts)
    if prepared is None:
        return forward_pass.forward(call, rounding)
    if prepared.call is not call:
        found = by_parts.forward(prepared.call, parts, rounding, has_graph)
    rows = by_parts.rows_of_tiles(found.lse, call.visibility, prepared.spoiled)
    return found if rows is None else _with_rows_of_tiles(call, found, rounding, rows)


def _with_rows_of_tiles(
    call: AttentionCall, found: ForwardResult, rounding: Tensor | None, rows: Tensor
) -> ForwardResult:
    """A result with these rows by tiles: no bit of a sequence depends on another's logits."""
    lost = None if rounding is None else torch.empty_like(rounding)
    tiles = forward_pass.forward(call, lost)
    out = torch.where(rows[..., None], tiles.out, found.out)
    if rounding is not None and lost is not None:
        rounding.copy_(torch.where(rows[..., None], lost, rounding))
    return ForwardResult(out, torch.where(rows, tiles.lse, found.lse))
