"""Packed sequences over a paged KV cache."""

import torch
from torch import Tensor

from tests.support.packed import Packed

WILD = (-1, 1 << 30)


class PagedBatch:
    """Sequences of some rows and keys, whose keys lie in pages of shuffled numbers; NaN in all other places.

    k and v lie in one tensor of pages [N, Hkv, page, D + Dv], as vLLM has them. The first `shared` pages of all
    sequences that fill them are the same ones. Entries of the table behind a sequence's keys are wild.
    """

    def __init__(self, q_lengths, k_lengths, page=16, shared=0, dtype=torch.float64, dims=(8, 6), seed=0) -> None:
        heads, kv_heads = 4, 2
        self.packed, self.page = Packed(tuple(q_lengths), tuple(k_lengths)), page
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

        self.q, self.kv = normal(self.packed.q_len, heads, dims[0]), normal(self.packed.k_len, kv_heads, sum(dims))
        members, full = [keys for _, keys in self.packed.members()], shared * page
        sharing = [keys for keys in members if keys.stop - keys.start >= max(full, 1)]
        for keys in sharing:
            self.kv[keys.start : keys.start + full] = self.kv[sharing[0].start : sharing[0].start + full]
        longest = -(-max(k_lengths, default=0) // page) + 1
        numbers = torch.randperm(len(members) * longest + 2, generator=draw)
        table = numbers[: len(members) * longest].view(len(members), longest)
        self.table = torch.tensor(WILD, dtype=torch.int32)[torch.arange(longest) % 2].repeat(len(members), 1)
        self.pages = normal(len(numbers), kv_heads, page, sum(dims)).fill_(torch.nan)
        for n, keys in enumerate(members):
            if keys in sharing:
                table[n, :shared] = table[members.index(sharing[0]), :shared]
            used = -(-(keys.stop - keys.start) // page)
            self.table[n, :used] = table[n, :used].int()
            for j, key in enumerate(range(keys.start, keys.stop)):
                self.pages[table[n, j // page], :, j % page] = self.kv[key]
        self.widths = list(dims)

    @property
    def k(self) -> Tensor:
        """[T_k, Hkv, D]"""
        return self.kv.split(self.widths, -1)[0]

    @property
    def v(self) -> Tensor:
        return self.kv.split(self.widths, -1)[1]

    @property
    def key_lengths(self) -> Tensor:
        return torch.tensor(self.packed.k_lengths)

    def contiguous(self) -> dict:
        """The arguments of `attention_varlen` without pages."""
        return {"q": self.q, "k": self.k, "v": self.v, **self.packed.arguments()}

    def arguments(self) -> dict:
        """The arguments of `attention_varlen` over the pages."""
        k, v = self.pages.transpose(1, 2).split(self.widths, -1)
        return {"q": self.q, "k": k, "v": v, **self.packed.arguments(), "block_table": self.table}
