"""The picture of README draws what was recorded."""

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from docs.figures import recall


@pytest.mark.parametrize("theme", recall.THEMES)
def test_every_mode_is_drawn_with_its_value(theme):
    (axes,) = recall.draw(theme).axes
    texts = [text.get_text() for text in axes.texts]
    for mode, by_length in recall.recalls().items():
        assert f"{mode}  {by_length[4096].mean:.0%}" in texts
        assert any(list(line.get_ydata()) == [one.mean for one in by_length.values()] for line in axes.lines)
    assert "train-compare --tasks recall --seeds 5" in recall.source()
