"""An attention call laid out flat: the arguments of an operator, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.call import AttentionCall, Gradients, Logits
from ..core.dropout import Dropout
from ..core.sequences import Sequences
from ..core.visibility import Visibility


class FlatCall(NamedTuple):
    """An AttentionCall as the arguments of an operator; the first fields are those of Gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    query_scale: Tensor | None
    key_scale: Tensor | None
    key_bias: Tensor | None
    sinks: Tensor | None
    key_lengths: Tensor | None
    key_ranges: Tensor | None
    mask: Tensor | None
    q_starts: Tensor | None
    k_starts: Tensor | None
    dropout_state: Tensor | None
    block_table: Tensor | None
    scale: float
    left: int | None
    right: int | None
    longest_q: int
    longest_k: int
    k_len: int
    softcap: float | None
    dropout_p: float
    invariant: bool
    aux: bool
    keep_rounding: bool
    backend: str

    @classmethod
    def of(cls, call: AttentionCall, backend: str, aux: bool, keep_rounding: bool) -> FlatCall:
        visible, sequences, dropout = call.visibility, call.visibility.sequences, call.dropout
        return cls(
            call.q,
            call.k,
            call.v,
            call.logits.query_scale,
            call.logits.key_scale,
            call.logits.key_bias,
            call.logits.sinks,
            key_lengths=visible.key_lengths,
            key_ranges=visible.key_ranges,
            mask=visible.mask,
            q_starts=None if sequences is None else sequences.q_starts,
            k_starts=None if sequences is None else sequences.k_starts,
            dropout_state=None if dropout is None else dropout.state,
            block_table=call.block_table,
            scale=call.logits.scale,
            left=visible.left,
            right=visible.right,
            longest_q=0 if sequences is None else sequences.longest_q,
            longest_k=0 if sequences is None else sequences.longest_k,
            k_len=visible.k_len,
            softcap=call.logits.softcap,
            dropout_p=0.0 if dropout is None else dropout.p,
            invariant=call.invariant,
            aux=aux,
            keep_rounding=keep_rounding,
            backend=backend,
        )

    def call(self) -> AttentionCall:
        sequences = None
        if self.q_starts is not None and self.k_starts is not None:
            sequences = Sequences(self.q_starts, self.k_starts, self.longest_q, self.longest_k)
        visibility = Visibility.of_shapes(
            self.q.shape,
            torch.Size((*self.k.shape[:2], self.k_len, self.k.shape[3])),
            self.q.device,
            window=(self.left, self.right),
            key_lengths=self.key_lengths,
            key_ranges=self.key_ranges,
            mask=self.mask,
            sequences=sequences,
            invariant=self.invariant,
        )
        logits = Logits(self.scale, self.query_scale, self.key_scale, self.key_bias, self.softcap, self.sinks)
        dropout = None if self.dropout_state is None else Dropout(self.dropout_p, self.dropout_state)
        return AttentionCall(self.q, self.k, self.v, visibility, logits, dropout, block_table=self.block_table)


# The first fields of FlatCall can have a gradient, and more of them are tensors.
GRADIENTS = len(Gradients._fields)
TENSORS = FlatCall._fields.index("scale")
