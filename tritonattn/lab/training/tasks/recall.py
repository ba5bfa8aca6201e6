"""Retrieval from a table that is larger in testing than in training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models import Attentions, Recaller, Sizes
from ..records import Recipe
from .base import Batch, Task

_SYMBOLS, _PLACES, _VALUES = 16, 4, 16
_ASKED = 16
_SHORTEST, _LONGEST = 16, 64
LENGTHS = (16, 64, 256, 1024, 4096)  # in testing


class Recall(Task):
    """Find the value of an asked key among n pairs of random keys and values.

    A key is 4 symbols out of 16, a value one out of 16, and no key is twice in a table. Training tables have 16 to 64
    pairs, padded to 64; test tables up to 4,096, where about 4 keys differ from the asked one in a single place.

    accuracy_<n>   share of right values in tables of n pairs; chance is 1/16
    """

    name, metric = "recall", "accuracy_4096"
    target = 0.25
    sizes = Sizes(width=64, heads=4, blocks=1)
    recipe = Recipe("adamw", 5e-3, weight_decay=0.01, steps=250, batch=32)

    def model(self, attentions: Attentions) -> nn.Module:
        return Recaller(attentions, _SYMBOLS, _PLACES, _VALUES, _LONGEST)

    def batch(self, size: int, random: torch.Generator) -> Batch:
        lengths = torch.randint(_SHORTEST, _LONGEST + 1, (size,), generator=random)
        return _tables(lengths, _LONGEST, random)

    def held_out(self) -> Batch:
        random = torch.Generator().manual_seed(1)
        return self.batch(64, random)

    def final(self, model: nn.Module, device: torch.device, quick: bool) -> dict[str, float]:
        random = torch.Generator().manual_seed(2)
        found = {}
        for n in LENGTHS:
            batches = 1 if quick else 4
            rights = []
            for _ in range(batches):
                batch = _tables(torch.full((4 if quick else 16,), n), n, random).to(device)
                rights.append((model(**batch.inputs).argmax(-1) == batch.target).double().mean())
            found[f"accuracy_{n}"] = float(torch.stack(rights).mean())
        return found


def _tables(lengths: Tensor, longest: int, random: torch.Generator) -> Batch:
    """Draw one table a row of `lengths`, each padded to `longest` pairs."""
    size = lengths.shape[0]
    # Sorted numbers, each raised by its rank, are distinct; then shuffle them.
    drawn = torch.randint(_SYMBOLS**_PLACES - longest + 1, (size, longest), generator=random).sort(dim=1).values
    shuffled = torch.rand(size, longest, generator=random).argsort(dim=1)
    codes = (drawn + torch.arange(longest)).gather(1, shuffled)  # [B, longest]
    powers = _SYMBOLS ** torch.arange(_PLACES)
    keys = codes[..., None] // powers % _SYMBOLS  # [B, longest, places]
    values = torch.randint(_VALUES, (size, longest), generator=random)
    chosen = (torch.rand(size, _ASKED, generator=random) * lengths[:, None]).long()  # [B, asked]
    rows = torch.arange(size)[:, None]
    inputs = {"keys": keys, "values": values, "lengths": lengths, "asked": keys[rows, chosen]}
    return Batch(inputs, values[rows, chosen])
