"""Colours and dashes of lines that every reader can tell apart, without a library for drawing."""

from __future__ import annotations

# The palette of Okabe and Ito, which colour-blind readers can tell apart, without its yellow, which paper swallows;
# then a grey and a wine.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777", "#882255")
# Lengths of strokes and gaps, in widths of the line; () is a solid line.
DASHES = ((), (5, 1.5), (1, 1), (6, 1.5, 1, 1.5), (2.5, 1))
_RAMP = ((13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64))  # matplotlib's plasma, without its yellow end


def ordered(count: int) -> list[str]:
    """Colours for lines in an order, as of layers: the palette, or where it is too short a ramp from dark to light."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    found = []
    for index in range(count):
        place = index / (count - 1) * (len(_RAMP) - 1)
        left = min(int(place), len(_RAMP) - 2)
        part = place - left
        mixed = (round(a + part * (b - a)) for a, b in zip(_RAMP[left], _RAMP[left + 1], strict=True))
        found.append("#" + "".join(f"{level:02X}" for level in mixed))
    return found
