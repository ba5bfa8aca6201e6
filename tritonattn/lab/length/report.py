"""Losses by position as tables and JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.provenance import Environment
from ...core.records import write
from ...core.tables import table

_NORMAL = 1.96  # quantile of a 95% interval


@dataclass(frozen=True, eq=False)
class Study:
    """Losses of a model by position.

    losses       by variant, the baseline first: [S - 1], entry i of token i + 1
    alone        losses of the baseline without the tokens before `start`: entry i of token start + 1 + i
    context      positions that the model was trained on
    """

    model: str
    text: str
    context: int
    bin: int
    losses: dict[str, Tensor]
    start: int
    alone: Tensor
    environment: Environment
    command: str
    quick: bool

    @property
    def tokens(self) -> int:
        return self.baseline.shape[0] + 1

    @property
    def baseline(self) -> Tensor:
        return next(iter(self.losses.values()))

    def bins(self) -> list[tuple[int, int]]:
        """Split the token numbers, from 1 on, into ranges."""
        edges = [1, *range(self.bin, self.tokens, self.bin), self.tokens]
        return [(lo, hi) for lo, hi in pairwise(edges) if lo < hi]

    def table(self) -> str:
        """One row a variant: mean loss within the trained context and beyond, and its difference from the baseline."""
        edges = (1, self.context // 2, self.context, self.tokens)
        parts = [(max(1, lo), min(hi, self.tokens)) for lo, hi in pairwise(edges)]
        parts = [(lo, hi) for lo, hi in parts if lo < hi]
        headers = ["scaling"]
        for lo, hi in parts:
            headers += [f"loss, tokens {lo} to {hi - 1}", "moved"]
        rows = []
        for name, values in self.losses.items():
            rows.append([name])
            for lo, hi in parts:
                loss, base = values[lo - 1 : hi - 1].double(), self.baseline[lo - 1 : hi - 1].double()
                rows[-1] += [f"{loss.mean():.4f}", "-" if values is self.baseline else difference(loss - base)]
        first = max(self.context, self.start + 1)
        if first < self.tokens:
            loss, base = self.alone[first - self.start - 1 :].double(), self.baseline[first - 1 :].double()
            blank = [""] * (2 * len(parts) - 2)
            without = f"sqrt_dim, nothing before {self.start}"
            rows.append([without, *blank, f"{loss.mean():.4f}", difference(loss - base)])
        return table(rows, headers)

    def by_position(self) -> str:
        """One row a range of tokens: the mean loss of every variant."""
        rows = [
            (f"{lo} to {hi - 1}", *(f"{_mean(values, lo - 1, hi - 1):.3f}" for values in self.losses.values()))
            for lo, hi in self.bins()
        ]
        return table(rows, ["tokens", *self.losses])

    def record(self) -> dict[str, Any]:
        bins, first = self.bins(), self.start + 1  # the token of entry 0 of `alone`
        later = [(lo - first, hi - first) for lo, hi in bins if lo >= first]
        alone = [round(_mean(self.alone, lo, hi), 4) for lo, hi in later]
        return {
            "model": self.model,
            "text": self.text,
            "tokens": self.tokens,
            "context": self.context,
            "quick": self.quick,
            "environment": asdict(self.environment),
            "command": self.command,
            "bins": bins,
            "loss": {name: [round(_mean(x, lo - 1, hi - 1), 4) for lo, hi in bins] for name, x in self.losses.items()},
            "second_part_alone": {
                "start": self.start,
                "loss": round(float(self.alone.mean()), 4),
                "by_bin": alone,
            },
        }

    def write_json(self, file: Path) -> None:
        write(file, json.dumps(self.record()) + "\n")


def _mean(values: Tensor, lo: int, hi: int) -> float:
    return float(values[lo:hi].mean())


def difference(values: Tensor) -> str:
    """Format the mean of differences, as if independent, with its 95% interval; a star where it excludes 0."""
    n = values.shape[0]
    half = _NORMAL * float(values.std()) / math.sqrt(n) if n > 1 else math.inf
    mean = float(torch.mean(values))
    return f"{mean:+.4f} ± {half:.4f}" + " *" * (abs(mean) > half)
