"""The figures of `tritonattn demo` as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .measurement import Measurement


def file_types() -> list[str]:
    """List the endings of files that can be drawn."""
    return sorted(FigureCanvasAgg.get_supported_filetypes())


def draw(model: str, measurements: Sequence[Measurement], file: Path) -> None:
    """Draw the loss of every mode and, by layer in the same colour, its entropy and its largest logit."""
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    losses, entropies, logits = figure.subplots(1, 3)
    colours = [f"C{index}" for index in range(len(measurements))]
    for row, (one, colour) in enumerate(zip(measurements, colours, strict=True)):
        losses.barh(row, one.loss, color=colour)
        layers = range(1, len(one.layers) + 1)
        entropies.plot(layers, [layer.entropy for layer in one.layers], color=colour)
        logits.plot(layers, [layer.largest_logit for layer in one.layers], color=colour)
    losses.set_yticks(range(len(measurements)), [one.mode for one in measurements])
    losses.invert_yaxis()
    losses.set_xlabel("loss per token (nats)")
    entropies.set(xlabel="layer", ylabel="attention entropy / ln n", ylim=(0, 1.05))
    logits.set(xlabel="layer", ylabel="largest logit", yscale="symlog")
    figure.suptitle(f"{model}: what the scaling of the attention logits does without retraining")
    figure.savefig(file, dpi=150)
