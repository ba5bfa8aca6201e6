"""Packed batches: their operands, and attention over every sequence alone, which they are held to."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

import tritonattn
from tests.support.masks import visible_pairs


@dataclass(frozen=True)
class Packed:
    """Lengths of the sequences, and how many rows and keys follow the last one."""

    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    q_tail: int = 0
    k_tail: int = 0

    @property
    def q_len(self) -> int:
        return sum(self.q_lengths) + self.q_tail

    @property
    def k_len(self) -> int:
        return sum(self.k_lengths) + self.k_tail

    def arguments(self, device: torch.device | str = "cpu") -> dict:
        """The arguments of `attention_varlen` that say where the sequences lie."""
        return {
            "cu_seqlens_q": offsets(self.q_lengths).to(device),
            "cu_seqlens_k": offsets(self.k_lengths).to(device),
            "max_seqlen_q": max(self.q_lengths, default=0),
            "max_seqlen_k": max(self.k_lengths, default=0),
        }

    def sequences(self) -> list[tuple[slice, slice]]:
        """Rows and keys of every sequence."""
        return list(zip(_slices(self.q_lengths), _slices(self.k_lengths), strict=True))

    def visible(self, causal: bool = False, window: tuple[int | None, int | None] | None = None) -> Tensor:
        """The visible pairs by their definition, bool [T_q, T_k]."""
        pairs = torch.zeros(self.q_len, self.k_len, dtype=torch.bool)
        for rows, keys in self.sequences():
            sizes = (1, 1, rows.stop - rows.start, keys.stop - keys.start)
            pairs[rows, keys] = visible_pairs(sizes, causal, window)[0, 0]
        return pairs


# Sequences without rows, without keys, with more rows than keys; rows and keys of no sequence.
RAGGED = Packed((3, 0, 5, 1, 4, 2), (4, 2, 0, 6, 2, 0), q_tail=2, k_tail=3)


def offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def packed_operands(packed: Packed, dtype=torch.float64, heads=(4, 2), dims=(8, 6), seed=0) -> dict[str, Tensor]:
    """q, k and v that ask for gradients; NaN in the rows and keys of no sequence."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(tail: int, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        x[shape[0] - tail :] = torch.nan
        return x.requires_grad_()

    return {
        "q": leaf(packed.q_tail, packed.q_len, heads[0], dims[0]),
        "k": leaf(packed.k_tail, packed.k_len, heads[1], dims[0]),
        "v": leaf(packed.k_tail, packed.k_len, heads[1], dims[1]),
    }


def one_by_one(
    packed: Packed,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gain: Tensor | None = None,
    key_bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    **arguments,
) -> tuple[Tensor, tritonattn.AttentionAux]:
    """The results of `attention_varlen` with return_aux, from one reference call a sequence."""
    outs, aux = [], []
    for rows, keys in packed.sequences():
        arrays = (x[part].transpose(0, 1)[None] for x, part in ((q, rows), (k, keys), (v, keys)))
        arguments["gain"] = gain if gain is None or gain.shape[-1] == 1 else gain[:, rows]
        arguments["key_bias"] = key_bias if key_bias is None else key_bias[:, keys]
        arguments["sinks"] = sinks if sinks is None or sinks.dim() == 1 else sinks[:, rows]
        if relative_bias is not None:
            arguments["relative_bias"] = (relative_bias if relative_bias.shape[1] == 1 else relative_bias[:, rows])[
                None
            ]
        out, of_sequence = tritonattn.attention(*arrays, **arguments, return_aux=True, backend="reference")
        outs.append(out[0].transpose(0, 1))
        aux.append([x[0] for x in of_sequence])
    outs.append(q.new_zeros(packed.q_tail, q.shape[1], v.shape[2]))
    nothing = aux[0][0].new_full((q.shape[1], packed.q_tail), -torch.inf)
    aux.append([nothing, nothing, torch.zeros_like(nothing)])
    return torch.cat(outs), tritonattn.AttentionAux(*(torch.cat(x, -1) for x in zip(*aux, strict=True)))


def _slices(lengths: tuple[int, ...]) -> list[slice]:
    ends = list(accumulate(lengths))
    return [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]
