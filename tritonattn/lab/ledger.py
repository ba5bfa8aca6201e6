"""A ledger: text whose answers lie anywhere before."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

NAMES, VALUES, FILLERS = 1024, 32, 32
VOCABULARY = NAMES + VALUES + FILLERS
_FILLER_SHARE = 0.2


def ledger(rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw tokens, int64 [rows, length + 1], and which of them are asked for, bool of the same shape.

    Records, a name and its value, stand among filler words. A name that comes again has the value it had, which is
    asked for. One item in five is a filler. A sequence draws the share of new names among its records from 0.05 to
    0.65; any other record repeats one of the names before it, each as likely. Names come first among the tokens, then
    values.
    """
    width = length + 1
    draw = functools.partial(torch.rand, generator=generator)
    is_filler = draw(rows, width) < _FILLER_SHARE
    is_new = ~is_filler & (draw(rows, width) < 0.05 + 0.6 * draw(rows, 1))
    first = (~is_filler).long().argmax(1, keepdim=True)  # the first record has a new name
    is_new.scatter_(1, first, ~is_filler.gather(1, first))
    seen = is_new.cumsum(1)
    before = torch.where(is_new, seen - 1, (draw(rows, width) * seen).long()).clamp(0, NAMES - 1)
    names = draw(rows, NAMES).topk(min(NAMES, width), dim=1).indices  # distinct, in random order
    values = NAMES + torch.randint(VALUES, (rows, NAMES), generator=generator)
    name = names.gather(1, before.clamp(max=names.shape[1] - 1))
    filler = NAMES + VALUES + torch.randint(FILLERS, (rows, width), generator=generator)
    starts = (2 - is_filler.long()).cumsum(1) - (2 - is_filler.long())
    tokens = torch.zeros(rows, 2 * width, dtype=torch.long)
    asked = torch.zeros(rows, 2 * width, dtype=torch.bool)
    # A filler's second place is that of the next item, which overwrites it: places are written in two passes.
    second = torch.where(is_filler, 2 * width - 1, starts + 1)
    tokens.scatter_(1, second, values.gather(1, name))
    asked.scatter_(1, second, ~is_new & ~is_filler)
    tokens.scatter_(1, starts, torch.where(is_filler, filler, name))
    return tokens[:, :width], asked[:, :width]
