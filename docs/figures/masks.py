"""The picture of masks in concepts.md: `python -m docs.figures.masks` draws the keys that rows attend to."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

import tritonattn
from tritonattn.lab.figures import COLOURS

from .themes import save_themes

TOKENS = 8
_HOLES = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
_HOLES[:, 2] = _HOLES[3:6, 5] = False
_DOCUMENTS = torch.tensor([[0, 3]] * 3 + [[3, 7]] * 4 + [[7, 8]], dtype=torch.int32)[None]
CALLS = {
    "causal=True": {"causal": True},
    "window=(2, 0)": {"window": (2, 0)},
    "key_lengths=[5]": {"key_lengths": torch.tensor([5])},
    "key_ranges, causal": {"key_ranges": _DOCUMENTS, "causal": True},
    "mask with holes": {"mask": _HOLES[None, None]},
}


def visible(**masks) -> torch.Tensor:
    """The keys that each row attends to, bool [Sq, Sk]: with equal logits each has probability 1 / n."""
    zeros, unit = torch.zeros(1, 1, TOKENS, 4), torch.eye(TOKENS)[None, None]
    return tritonattn.attention(zeros, zeros, unit, **masks)[0, 0] > 0


def draw() -> Figure:
    figure = Figure(figsize=(10, 2.3), layout="constrained")
    for axes, (title, masks) in zip(figure.subplots(1, len(CALLS), sharey=True).flat, CALLS.items(), strict=True):
        _panel(axes, visible(**masks), title)
    figure.axes[0].set_ylabel("row i")
    figure.get_layout_engine().set(wspace=0.14)
    return figure


def _panel(axes: Axes, seen: torch.Tensor, title: str) -> None:
    axes.imshow(seen.tolist(), cmap=ListedColormap(["#F2F2F2", COLOURS[2]]), vmin=0, vmax=1)
    axes.set_title(title, fontsize=10, family="monospace")
    axes.set(xticks=range(TOKENS), yticks=range(TOKENS), xlabel="key j")
    axes.tick_params(labelsize=8, length=0)
    axes.set_xticks([x - 0.5 for x in range(1, TOKENS)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, TOKENS)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    axes.text(TOKENS - 0.05, -1, "n", ha="center", va="center", fontsize=9, weight="bold")
    for row, count in enumerate(seen.sum(1).tolist()):
        axes.text(TOKENS - 0.05, row, str(count), ha="center", va="center", fontsize=9)


if __name__ == "__main__":
    print(*save_themes(draw(), Path(__file__).with_suffix(".png"), dpi=132), sep="\n")
