"""The picture of layouts in distributed.md: `python -m docs.figures.layouts` draws who computes which logits."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from tritonattn.distributed.layout import LAYOUTS, Split
from tritonattn.lab.figures import COLOURS

from .themes import save_themes

RANKS, TOKENS = 4, 32


def owners(layout: str) -> torch.Tensor:
    """The rank that holds each token: int [TOKENS]."""
    rank_of = torch.empty(TOKENS, dtype=torch.int64)
    for rank in range(RANKS):
        split = Split(None, rank, RANKS, layout)
        rank_of[split.positions(TOKENS // RANKS, torch.device("cpu"))] = rank
    return rank_of


def work(layout: str) -> list[float]:
    """The share of all causal logits that each rank computes."""
    rows = torch.arange(1, TOKENS + 1, dtype=torch.float64)
    return [(rows[owners(layout) == rank].sum() / rows.sum()).item() for rank in range(RANKS)]


def draw() -> Figure:
    figure = Figure(figsize=(7.4, 3.5), layout="constrained")
    for axes, layout in zip(figure.subplots(1, 2, sharey=True).flat, LAYOUTS, strict=True):
        _panel(axes, layout)
    figure.axes[0].set_ylabel("row i, by the rank that holds it")
    return figure


def _panel(axes: Axes, layout: str) -> None:
    causal = torch.ones(TOKENS, TOKENS).tril() > 0
    ranks = torch.where(causal, owners(layout)[:, None] + 1, 0)
    axes.imshow(ranks.tolist(), cmap=ListedColormap(["#F2F2F2", *COLOURS[1:5]]), vmin=0, vmax=RANKS)
    axes.set_title(f'layout="{layout}"', fontsize=10, family="monospace")
    axes.set(xticks=[], yticks=[], xlabel="key j")
    n = TOKENS // RANKS if layout == "contiguous" else TOKENS // (2 * RANKS)
    shares = work(layout)
    for first in range(0, TOKENS, n):
        rank = int(owners(layout)[first])
        axes.axhline(first - 0.5, color="white", linewidth=1)
        text = f"rank {rank}: {shares[rank]:.0%}" if layout == "contiguous" else f"rank {rank}"
        axes.text(TOKENS + 0.2, first + (n - 1) / 2, text, ha="left", va="center", fontsize=8)
    if layout == "zigzag":
        axes.set_title(f'layout="{layout}": {shares[0]:.0%} each', fontsize=10, family="monospace")


if __name__ == "__main__":
    print(*save_themes(draw(), Path(__file__).with_suffix(".png"), dpi=132), sep="\n")
