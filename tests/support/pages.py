"""Packed sequences over a paged KV cache, and attention over each of them by hand."""

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


def by_hand(batch: PagedBatch, scaling, gain, causal, window, softcap=None, sinks=None, key_bias=None):
    """out [T_q, Hq, Dv] and lse [Hq, T_q] of fp64 operands, a sequence at a time, by a mode's dense formula.

    gain [Hq, T_q], key_bias [Hq, T_k].
    """
    outs, lses = [], []
    for rows, keys in batch.packed.members():
        q, k, v = (x.transpose(0, 1) for x in (batch.q[rows], batch.k[keys], batch.v[keys]))
        k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)  # [Hq, Sk, D]
        own = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        j = torch.arange(k.shape[1])
        left, right = window or (None, None)
        right = 0 if causal else right
        sees = (j >= own - left) if left is not None else torch.ones(len(own), len(j), dtype=torch.bool)
        sees = sees & (j <= own + right) if right is not None else sees
        visible = sees.expand(len(q), -1, -1)
        lone = sees.any(-1)[:, None]
        hidden = torch.where(sees.any(0)[:, None], k, 0)
        factor = scaling.multiplier(torch.where(lone, q, 0)[None], hidden[None], visible[None])
        factor = factor[0] if isinstance(factor, Tensor) and factor.dim() == 4 else factor
        logit = (q @ k.mT) * factor * gain[:, rows, None]
        logit = logit if key_bias is None else logit + key_bias[:, None, keys]
        logit = logit if softcap is None else softcap * torch.tanh(logit / softcap)
        weight = torch.where(visible, logit, -torch.inf)
        lses.append(weight.logsumexp(-1))
        if sinks is not None:
            weight = torch.cat([weight, sinks[:, None, None].expand(-1, len(own), 1)], -1)
        weight = weight.softmax(-1)[..., : len(j)]
        outs.append(torch.where(lone, torch.where(visible, weight, 0) @ v, 0).transpose(0, 1))
    return torch.cat(outs), torch.cat(lses, -1)
