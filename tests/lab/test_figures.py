"""The look that pictures share."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from tritonattn.lab.demo import plot
from tritonattn.lab.demo.measurement import Layer, Measurement
from tritonattn.lab.figures import foot, plain_numbers, save, staggered, styles, ticks_at
from tritonattn.lab.palette import COLOURS

PROVENANCE = "Measured: Some(R) Long Processor (1 thread), torch 2.13, `python -m tritonattn " + "--option value " * 30


def drawn() -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    figure.subplots().plot([1, 2], [1, 2])
    return figure


def luminance(colour: str) -> float:
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_looks_differ_in_colour_or_in_marker_and_all_are_seen_on_white():
    looks = styles(map(str, range(90)))
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == 90
    assert len({look["color"] for look in list(looks.values())[: len(COLOURS)]}) == len(COLOURS)
    assert max(map(luminance, COLOURS)) < 0.7


@pytest.mark.parametrize(("series", "points"), [(2, 30), (5, 30), (9, 25), (6, 6), (1, 1)])
def test_lines_that_coincide_show_their_marks_in_turn(series, points):
    shown = [set(range(points)[slice(*_slice(index, series, points))]) for index in range(series)]
    assert all(shown)
    every = max(1, min(series, points // 3))
    assert all(shown[i].isdisjoint(shown[j]) for i in range(every) for j in range(i))


def _slice(index: int, series: int, points: int) -> tuple[int, None, int]:
    start, every = staggered(index, series, points)
    return start, None, every


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


def test_a_png_has_a_palette_and_other_formats_are_kept(tmp_path):
    save(drawn(), tmp_path / "a.png")
    save(drawn(), tmp_path / "a.svg")
    assert (tmp_path / "a.png").read_bytes()[25] == 3  # the header's colour type: a palette
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_ticks_of_logarithmic_axes_are_numbers():
    figure = drawn()
    axes = figure.axes[0]
    axes.set(xscale="log", yscale="log", xlim=(16, 4096), ylim=(0.01, 2))
    ticks_at(axes.xaxis, [16, 1024])
    plain_numbers(axes.yaxis)
    figure.draw_without_rendering()
    assert [tick.get_text() for tick in axes.get_xticklabels(which="both")] == ["16", "1,024"]
    assert {"0.01", "0.02", "0.5", "1"} <= {tick.get_text() for tick in axes.get_yticklabels()}


@pytest.mark.parametrize("scale", ["log", "symlog"])
@pytest.mark.parametrize("ends", [(0.9, 1.2), (1.1, 3), (1, 12), (0.02, 300)], ids=str)
def test_an_axis_of_any_width_has_several_ticks(scale, ends):
    axes = drawn().axes[0]
    axes.set(yscale=scale, ylim=ends)
    plain_numbers(axes.yaxis)
    shown = [tick for tick in axes.get_yticks() if ends[0] <= tick <= ends[1]]
    assert 3 <= len(shown) <= 14


@pytest.mark.parametrize(
    ("names", "numbers"),
    [([""] * 3, [0, 1, 2]), (["model.layers.3.self_attn", "model.layers.28.self_attn"], [3, 28])],
    ids=["without numbers", "some layers"],
)
def test_layers_of_the_demo_have_their_numbers_on_whole_ticks(names, numbers, monkeypatch, tmp_path):
    pictures = []
    monkeypatch.setattr(plot, "save", lambda figure, file: pictures.append(figure))
    measurements = [
        Measurement(mode, loss, tuple(Layer(0.5, 3.0, name=name) for name in names), 0.0)
        for mode, loss in (("sqrt_dim", 3.25), ("key_count", 7.5))
    ]
    plot.draw("small", measurements, "where", tmp_path / "a.png")
    losses, entropies, logits = pictures[0].axes
    for axes in (entropies, logits):
        assert all(list(line.get_xdata()) == numbers for line in axes.lines)
        assert all(tick == round(tick) for tick in axes.get_xticks())
    assert {"3.250", "7.500"} <= {text.get_text() for text in losses.texts}
    assert COLOURS[0] == losses.lines[0].get_color()
