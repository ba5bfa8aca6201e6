"""The figures of `tritonattn compare` as a picture."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from ...core.provenance import Environment
from ...huggingface.architecture import layer_number
from ..figures import foot, plain_numbers, staggered, styles, values_at_right, whole_numbers
from .measurement import Measurement


def figure_of(model: str, measurements: Sequence[Measurement], environment: Environment) -> Figure:
    """Draw the loss of every mode, and its entropy and largest logit by the layers' numbers, as `patch` counts them."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    losses, entropies, logits = figure.subplots(1, 3)
    looks = styles(one.mode for one in measurements)
    for row, one in enumerate(measurements):
        look = looks[one.mode]
        losses.plot(one.loss, row, **{**look, "markersize": 7})
        marks = staggered(row, len(measurements), len(one.layers))
        found = [layer_number(layer.name) for layer in one.layers]  # None of a layer whose name has none
        numbers = [index if number is None else number for index, number in enumerate(found)]
        entropies.plot(numbers, [layer.entropy_over_ln_n for layer in one.layers], **look, markevery=marks)
        logits.plot(numbers, [layer.largest_logit for layer in one.layers], **look, markevery=marks)
    losses.set_yticks(range(len(measurements)), [one.mode for one in measurements])
    losses.invert_yaxis()
    losses.grid(alpha=0.3)
    losses.set_xlabel("loss per token (nats)")
    values_at_right(losses, [f"{one.loss:.3f}" for one in measurements])
    entropies.set(xlabel="layer", ylabel="attention entropy / ln n", ylim=(0, 1.05))
    logits.set(xlabel="layer", ylabel="largest logit", yscale="symlog")
    for axes in (entropies, logits):
        whole_numbers(axes.xaxis)
    plain_numbers(logits.yaxis)
    figure.suptitle(f"{model}: what the scaling of the attention logits does without retraining")
    foot(figure, f"Measured: {environment}", looks, columns=6)
    return figure
