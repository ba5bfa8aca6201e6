"""A step of a server: new tokens of sequences whose keys lie in pages."""

import torch
from torch import Tensor

from tritonattn.calls.varlen import Packing
from tritonattn.integrations.serving.layers import Step, key_ends


def step_of(new: list[int], keys: list[int], decodes: int, table: Tensor, page: int) -> Step:
    """The step of sequences with so many new tokens and keys, new ones included; the first `decodes` have one token.

    table   their pages, int32 [sequences, pages]
    """
    owner = torch.repeat_interleave(torch.arange(len(new)), torch.tensor(new))
    position = torch.cat([torch.arange(end - count, end) for count, end in zip(new, keys, strict=True)])
    slots = table[owner, position // page].long() * page + position % page
    ends, lengths, chunks = key_ends(torch.tensor(new)), torch.tensor(keys, dtype=torch.int32), None
    if decodes < len(new):
        offsets = ends[decodes:] - decodes, key_ends(lengths[decodes:])
        chunks = Packing(*offsets, max(new), max(keys), table[decodes:])
    return Step(sum(new), slots, ends, lengths, table, 1, decodes, chunks)
