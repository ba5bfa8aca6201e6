"""Operands of a call of a given `Problem` and `Size`: random, or on the meta device without memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...core.call import AttentionCall
from ...core.dropout import Dropout
from ...core.eight_bit import EIGHT_BIT
from ...core.sequences import Sequences
from ...core.terms import TERMS, Term, Terms
from ...core.visibility import Visibility
from ...tuning.calls import Size
from ...tuning.config import Problem

_EXTENT = 1024  # of a relative bias


class Operands:
    """Draws the tensors of calls.

    Lengths of sequences lie between 5/8 of the longest and all of it. A mask shows nine tenths of the pairs.
    Pages lie in any order. Operands that are not aligned have rows of an odd stride; where a copy would be aligned they
    are the same for every batch entry, since others would be copied.
    """

    def __init__(self, problem: Problem, size: Size, device: torch.device, seed: int = 0) -> None:
        self.problem, self.size, self.device = problem, size, device
        self._random = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if self._random is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return torch.randn(shape, generator=self._random, device=self.device, dtype=torch.float32).to(dtype)

    def like(self, x: Tensor) -> Tensor:
        """One of the shape, dtype and strides of another, as tangents are."""
        shape = (size if step else 1 for size, step in zip(x.shape, x.stride(), strict=True))
        return self.normal(*shape, dtype=x.dtype).expand(x.shape)

    def operand(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """One in a dtype, the problem's where None, with its alignment."""
        dtype = dtype or self.problem.dtype
        if self.problem.aligned:
            return self.normal(*shape, dtype=dtype)
        batch, *outer, width = shape
        has_whole_vectors = width * dtype.itemsize % 16 == 0
        lead = 1 if has_whole_vectors else batch
        wide = self.normal(lead, *outer, width + 1 + width % 2, dtype=dtype)
        return wide[..., :width].expand(shape)

    def attention(self) -> AttentionCall:
        problem, rows, keys = self.problem, self._rows(), self._keys()
        q, (k, v) = self.operand(*rows, problem.head_dim), self._keys_and_values(keys)
        return AttentionCall(
            q.float() if problem.fp32_grad_q else q,
            k.float() if problem.fp32_grad_k else k,
            v,
            self._visibility(rows, keys),
            self._terms(rows, keys),
            Dropout(0.5, self._integers(2**31 - 1, 2)) if problem.dropout else None,
            is_part=problem.is_part,
            block_table=self._block_table(),
        )

    def decode(self) -> AttentionCall:
        """A call whose rows stand at the end of their sequences in a cache."""
        problem, size = self.problem, self.size
        rows, keys = (size.batch, size.heads, size.q_len), (size.batch, size.kv_heads, self._capacity())
        visible = Visibility.of_padded(
            (size.batch, size.heads, size.kv_heads, size.q_len, keys[2]),
            self.device,
            self._spread(size.batch, keys[2]),
            self._spread(size.batch, size.q_len) if problem.sequences else None,
            left=size.left if problem.left else None,
        )
        if problem.key_ranges:
            visible = replace(visible, key_ranges=self._ranges(size.batch, 1, keys[2]))
        q, (k, v) = self.operand(*rows, problem.head_dim), self._keys_and_values(keys)
        return AttentionCall(q, k, v, visible, self._terms(rows, keys), block_table=self._block_table())

    def _rows(self) -> tuple[int, int, int]:
        size = self.size
        return (1, size.heads, size.q_total) if self.problem.sequences else (size.batch, size.heads, size.q_len)

    def _keys(self) -> tuple[int, int, int]:
        size = self.size
        if self.problem.sequences:
            return 1, size.kv_heads, size.k_total
        return size.batch, size.kv_heads, self._capacity()

    def _capacity(self) -> int:
        """Keys of a batch entry: with pages, those of whole ones."""
        return self._pages() * self.size.page or self.size.k_len

    def _pages(self) -> int:
        """Pages of a batch entry."""
        return -(-self.size.k_len // self.size.page) if self.size.page else 0

    def _visibility(self, rows: tuple[int, int, int], keys: tuple[int, int, int]) -> Visibility:
        problem, size, (batch, _, q_len), k_len = self.problem, self.size, rows, keys[2]
        sides = (size.left if problem.left else None, size.right if problem.right else None)
        return Visibility.of_shapes(
            torch.Size((*rows, problem.head_dim)),
            torch.Size((*keys, problem.head_dim)),
            self.device,
            window=sides,
            key_lengths=self._spread(batch, k_len) if problem.key_lengths else None,
            key_ranges=self._ranges(batch, q_len, k_len) if problem.key_ranges else None,
            mask=self._integers(10, batch, 1, q_len, k_len) > 0 if problem.mask else None,
            sequences=self._sequences() if problem.sequences else None,
        )

    def _sequences(self) -> Sequences:
        size = self.size
        q_starts, k_starts = self._starts(size.q_total, size.q_len), self._starts(size.k_total, size.k_len)
        return Sequences(q_starts, k_starts, size.q_len, size.k_len)

    def _starts(self, total: int, longest: int) -> Tensor:
        """Starts of one longest sequence, and others of about the same length: int32 [N + 1]."""
        others, first = self.size.batch - 1, min(longest, total)
        rest = min(total - first, others * longest)
        ends = [first + rest * n // max(others, 1) for n in range(others + 1)]
        return torch.tensor([0, *ends], dtype=torch.int32, device=self.device)

    def _ranges(self, batch: int, rows: int, keys: int) -> Tensor:
        """Ranges of about half of the keys, int32 [B, rows, 2]."""
        first = self._integers(keys // 2 + 1, batch, rows)
        return torch.stack([first, first + keys // 2], dim=-1).int()

    def _spread(self, batch: int, longest: int) -> Tensor:
        """Lengths between 5/8 of the longest and all of it: int32 [B]."""
        lengths = [longest - longest * (n % 4) // 8 for n in range(batch)]
        return torch.tensor(lengths, dtype=torch.int32, device=self.device)

    def _terms(self, rows: tuple[int, int, int], keys: tuple[int, int, int]) -> Terms:
        names, lengths = ("B", "Hq", "Sq", "Hkv", "Sk", "G", "extent"), (*rows, *keys[1:], self.size.group, _EXTENT)
        sizes = dict(zip(names, lengths, strict=True))
        flagged = (term for term in TERMS if term.flag and getattr(self.problem, term.name))
        return Terms(self.problem.head_dim**-0.5, **{term.name: self._term(term, sizes) for term in flagged})

    def _term(self, term: Term, sizes: dict[str, int]) -> Any:
        if not term.axes:
            return term.typical if term.form == "number" else True
        shape = [sizes[axis] if axis in term.typical else 1 for axis in term.axes]
        if term.form == "pairs":
            return self.normal(*shape, dtype=self.problem.dtype)
        return self.normal(*shape).expand([sizes[axis] for axis in term.axes])

    def _keys_and_values(self, keys: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """k and v [B, Hkv, Sk, D or Dv]; or pages [P, Hkv, page, D or Dv], in memory [P, page, Hkv, D or Dv]."""
        problem, size = self.problem, self.size
        lead = (size.batch * self._pages(), size.page, keys[1]) if problem.block_table else keys
        dtype, widths = EIGHT_BIT if problem.eight_bit else None, (problem.head_dim, problem.value_dim)
        k, v = (self.operand(*lead, width, dtype=dtype) for width in widths)
        return (k.transpose(1, 2), v.transpose(1, 2)) if problem.block_table else (k, v)

    def _block_table(self) -> Tensor | None:
        if not self.problem.block_table:
            return None
        count = self.size.batch * self._pages()
        numbers = torch.randperm(count, generator=self._random, device=self.device)
        return numbers.int().view(self.size.batch, -1)

    def _integers(self, end: int, *shape: int) -> Tensor:
        return torch.randint(0, end, shape, generator=self._random, device=self.device)
