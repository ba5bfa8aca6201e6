"""The look that pictures share."""

import pytest
from matplotlib.figure import Figure

from tritonattn.lab.demo import plot
from tritonattn.lab.demo.measurement import Layer, Measurement
from tritonattn.lab.figures import COLOURS, foot, styles

PROVENANCE = "Measured: Some(R) Long Processor (1 thread), torch 2.13, `python -m tritonattn " + "--option value " * 30


def drawn() -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    figure.subplots().plot([1, 2], [1, 2])
    return figure


@pytest.mark.parametrize("legend", [None, 1, 12])
def test_the_source_is_whole_and_covers_nothing(legend, tmp_path):
    figure = drawn()
    foot(figure, PROVENANCE, None if legend is None else styles(map(str, range(legend))))
    figure.savefig(tmp_path / "a.png")
    (text,) = (text for text in figure.texts if text.get_text())
    assert " ".join(text.get_text().split()) == " ".join(PROVENANCE.split())
    page, box = figure.bbox, text.get_window_extent()
    assert page.x0 <= box.x0 < box.x1 <= page.x1
    assert page.y0 <= box.y0
    others = [figure.axes[0].get_tightbbox(), *(one.get_window_extent() for one in figure.legends)]
    assert all(box.y1 <= other.y0 for other in others)
    assert not figure.legends or figure.legends[0].get_window_extent().y1 <= others[0].y0


@pytest.mark.parametrize(
    ("names", "numbers"),
    [([""] * 3, [0, 1, 2]), (["model.layers.3.self_attn", "model.layers.28.self_attn"], [3, 28])],
    ids=["without numbers", "some layers"],
)
def test_layers_of_the_demo_have_their_numbers_on_whole_ticks(names, numbers, monkeypatch, tmp_path):
    pictures = []
    monkeypatch.setattr(plot, "save", lambda figure, file: pictures.append(figure))
    measurements = [
        Measurement(mode, loss, tuple(Layer(name, 0.5, 3.0) for name in names), 0.0)
        for mode, loss in (("sqrt_dim", 3.25), ("key_count", 7.5))
    ]
    plot.draw("small", measurements, "where", tmp_path / "a.png")
    losses, entropies, logits = pictures[0].axes
    for axes in (entropies, logits):
        assert all(list(line.get_xdata()) == numbers for line in axes.lines)
        assert all(tick == round(tick) for tick in axes.get_xticks())
    assert {"3.250", "7.500"} <= {text.get_text() for text in losses.texts}
    assert COLOURS[0] == losses.lines[0].get_color()
