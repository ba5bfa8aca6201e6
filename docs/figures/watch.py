"""The picture of monitoring.md: `python -m docs.figures.watch` trains a small GPT too fast, and draws its records.

Its learning rate, 0.02, is too large for it. QK-clip takes a head back whose logits pass 20.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

import tritonattn
from perf.studies.texts import WONDERLAND
from tritonattn.analysis import Monitor, Thresholds, qk_clip
from tritonattn.lab.watch.curves import Watched
from tritonattn.lab.watch.picture import figure_of

from .themes import save_themes

FIGURE = Path(__file__).with_name("watch.png")
RECORDS = Path(__file__).parents[1] / "data/watch.jsonl"
WIDTH, HEADS, LENGTH, LAYERS, STEPS = 64, 4, 64, 4, 300
LIMIT = 20.0  # small, as the model is


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.attention = tritonattn.nn.ScaledAttention(WIDTH, HEADS, causal=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(128, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, 128)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.tokens(tokens) + self.positions.weight))


def train(file: Path) -> None:
    """Train, and write the records."""
    torch.manual_seed(0)
    text = torch.tensor(list(WONDERLAND.read_bytes()))
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    clip, limits = qk_clip(model, threshold=LIMIT), Thresholds(max_logit=LIMIT)
    with Monitor(model, every=10, file=file, thresholds=limits, on_alarm=clip) as monitor:
        for _ in range(STEPS):
            starts = torch.randint(len(text) - LENGTH - 1, (16,))
            batch = torch.stack([text[start : start + LENGTH + 1] for start in starts])
            loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss)


if __name__ == "__main__":
    RECORDS.unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of alarms, which the picture shows
        train(RECORDS)
    print(*save_themes(figure_of(Watched.read(RECORDS)), FIGURE), sep="\n")
