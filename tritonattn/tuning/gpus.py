"""The GPUs for which tables are shipped, and how their names are recognised."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .config import Target


@dataclass(frozen=True)
class GPU:
    """A card, or cards that differ only in memory: the stem of its table's file, its architecture and its processors.

    words        those of a device's name ("NVIDIA H100 80GB HBM3") that say it is this one
    processors   streaming multiprocessors, or AMD's compute units
    """

    name: str
    target: Target
    words: tuple[str, ...]
    processors: int


# Processors by the datasheets.
GPUS = (
    GPU("a100", Target.parse("sm_80"), ("a100",), 108),
    GPU("a10", Target.parse("sm_86"), ("a10",), 72),
    GPU("l40s", Target.parse("sm_89"), ("l40s",), 142),
    GPU("h100", Target.parse("sm_90"), ("h100",), 132),
    GPU("h200", Target.parse("sm_90"), ("h200",), 132),
    GPU("b200", Target.parse("sm_100"), ("b200",), 148),
    GPU("rtx_pro_6000", Target.parse("sm_120"), ("rtx", "pro", "6000"), 188),
    GPU("rtx_5090", Target.parse("sm_120"), ("rtx", "5090"), 170),
    GPU("mi300x", Target.parse("gfx942"), ("mi300x",), 304),
    GPU("mi350x", Target.parse("gfx950"), ("mi350x",), 256),
)


def table_name(target: Target) -> str:
    """The stem of the file for a target's card: that of a known GPU, else its name in lower case; "" without a name."""
    words = re.findall(r"[a-z0-9]+", target.card.lower())
    for gpu in GPUS:
        if gpu.target.arch == target.arch and set(gpu.words) <= set(words):
            return gpu.name
    return "_".join(words)
