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
        parts = [(max(1, self.context // 2), min(self.context, self.tokens)), (self.context, self.tokens)]
        parts = [(1, min(self.context // 2, self.tokens)), *parts]
        parts = [(lo, hi) for lo, hi in parts if lo < hi]
        rows = []
        for name, values in self.losses.items():
            cells = []
            for lo, hi in parts:
                own, base = values[lo - 1 : hi - 1].double(), self.baseline[lo - 1 : hi - 1].double()
                cells.append(f"{own.mean():.4f}")
                cells.append("-" if values is self.baseline else difference(own - base))
            rows.append((name, *cells))
        if (alone := self._alone_beyond()) is not None:
            blank = [""] * (2 * len(parts) - 2)
            rows.append(
                (
                    f"sqrt_dim, nothing before {self.start}",
                    *blank,
                    f"{alone[0].mean():.4f}",
                    difference(alone[0] - alone[1]),
                )
            )
        headers = ["scaling"]
        for lo, hi in parts:
            headers += [f"loss, tokens {lo} to {hi - 1}", "moved"]
        return table(rows, headers)

    def by_position(self) -> str:
        """One row a range of tokens: the mean loss of every variant."""
        rows = [
            (f"{lo} to {hi - 1}", *(f"{float(values[lo - 1 : hi - 1].mean()):.3f}" for values in self.losses.values()))
            for lo, hi in self.bins()
        ]
        headers = ["tokens", *self.losses]
        return table(rows, headers)

    def _alone_beyond(self) -> tuple[Tensor, Tensor] | None:
        """Losses of the tokens beyond the context, without and with the tokens before `start`."""
        first = max(self.context, self.start + 1)
        if first >= self.tokens:
            return None
        return self.alone[first - self.start - 1 :].double(), self.baseline[first - 1 :].double()

    def record(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "text": self.text,
            "tokens": self.tokens,
            "context": self.context,
            "quick": self.quick,
            "environment": asdict(self.environment),
            "command": self.command,
            "bins": self.bins(),
            "loss": {
                name: [round(float(x[lo - 1 : hi - 1].mean()), 4) for lo, hi in self.bins()]
                for name, x in self.losses.items()
            },
            "second_part_alone": {
                "start": self.start,
                "loss": round(float(self.alone.mean()), 4),
                "by_bin": self._alone_by_bin(),
            },
        }

    def _alone_by_bin(self) -> list[float]:
        """Losses without the tokens before `start`, of the bins that lie behind it."""
        first = self.start + 1  # the token of entry 0
        later = [(lo - first, hi - first) for lo, hi in self.bins() if lo >= first]
        return [round(float(self.alone[lo:hi].mean()), 4) for lo, hi in later]

    def write_json(self, file: Path) -> None:
        write(file, json.dumps(self.record()) + "\n")


def difference(values: Tensor) -> str:
    """Format the mean of differences, as if independent, with its 95% interval; a star where it excludes 0."""
    n = values.shape[0]
    half = _NORMAL * float(values.std()) / math.sqrt(n) if n > 1 else math.inf
    mean = float(torch.mean(values))
    return f"{mean:+.4f} ± {half:.4f}" + " *" * (abs(mean) > half)
