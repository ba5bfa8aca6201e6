"""Pictures of pages, in a light and a dark look."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, cast

from matplotlib.collections import Collection
from matplotlib.colors import ListedColormap, to_hex, to_rgba, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image

from tritonattn.core.records import write

# On dark paper: what stands for black, white, the palette's others, and three greys of frames and unseen cells.
_DARK = {
    "#000000": "#E6EDF3",
    "#ffffff": "#0D1117",
    "#d55e00": "#FF8A3D",
    "#0072b2": "#4DA6F0",
    "#009e73": "#2BC99A",
    "#cc79a7": "#E8A0CB",
    "#e69f00": "#FFC44D",
    "#56b4e9": "#A5DCFF",
    "#777777": "#9AA4AF",
    "#882255": "#D1608F",
    "#f2f2f2": "#21262D",
    "#d0d0d0": "#525C66",
    "#cccccc": "#3A424B",
}


def darken(figure: Figure) -> None:
    """Give a drawn figure its dark look: the same marks, each colour replaced by the one that stands for it."""
    figure.draw_without_rendering()  # ticks and their labels are made by drawing
    for axes in figure.axes:
        axes.tick_params(which="both", colors=_DARK["#000000"])  # of ticks that saving adds, too
    for artist in figure.findobj():
        for name in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            if hasattr(artist, f"get_{name}") and hasattr(artist, f"set_{name}"):
                colours = getattr(artist, f"get_{name}")()
                several = isinstance(artist, Collection)
                getattr(artist, f"set_{name}")([*map(_on_dark, colours)] if several else _on_dark(colours))
        if isinstance(artist, AxesImage) and isinstance(artist.cmap, ListedColormap):
            colours = to_rgba_array(cast(Any, artist.cmap).colors)
            artist.set_cmap(ListedColormap([_on_dark(colour) for colour in colours]))


def _on_dark(colour: Any) -> Any:
    return colour if to_rgba(colour)[3] == 0 else _DARK.get(to_hex(colour), colour)


def save_themes(figure: Figure, file: Path, dpi: int = 120) -> tuple[Path, Path]:
    """Write NAME.png and, for pages on dark paper, NAME-dark.png; the figure is dark afterwards."""
    dark = file.with_stem(f"{file.stem}-dark")
    _save(figure, file, dpi)
    darken(figure)
    _save(figure, dark, dpi)
    return file, dark


def _save(figure: Figure, file: Path, dpi: int) -> None:
    """Write a .png with a palette of 128 colours, a third of the size."""
    picture, small = io.BytesIO(), io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    Image.open(picture).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    write(file, small.getvalue())
