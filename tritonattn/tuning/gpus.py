"""The GPUs for which tables are shipped, others whose facts are known, and which table is nearest to a card."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .config import Target


@dataclass(frozen=True)
class GPU:
    """A card, or cards that differ only in memory: the stem of its table's file, and its facts.

    words        those of a device's name ("NVIDIA H100 80GB HBM3") that say it is this one
    processors   streaming multiprocessors, or AMD's compute units
    teraflops    of dense bf16 products with fp32 sums
    bandwidth    of its memory in TB/s
    """

    name: str
    target: Target
    words: tuple[str, ...]
    processors: int
    teraflops: float
    bandwidth: float

    @property
    def flops_per_byte(self) -> float:
        return self.teraflops / self.bandwidth


def _gpu(name: str, target: str, processors: int, teraflops: float, bandwidth: float) -> GPU:
    return GPU(name, Target.parse(target), tuple(name.split("_")), processors, teraflops, bandwidth)


# By the vendors' datasheets and architecture whitepapers, of SXM modules where there are several. GeForce cards add in
# fp32 at half the rate that their datasheets print for fp16.
GPUS = (
    _gpu("a100", "sm_80", 108, 312, 2.039),
    _gpu("a10", "sm_86", 72, 125, 0.600),
    _gpu("l40s", "sm_89", 142, 362, 0.864),
    _gpu("h100", "sm_90", 132, 989, 3.35),
    _gpu("h200", "sm_90", 132, 989, 4.8),
    _gpu("b200", "sm_100", 148, 2250, 8.0),
    _gpu("rtx_pro_6000", "sm_120", 188, 503.8, 1.792),
    _gpu("rtx_5090", "sm_120", 170, 209.5, 1.792),
    _gpu("mi300x", "gfx942", 304, 1307, 5.3),
    _gpu("mi350x", "gfx950", 256, 2300, 8.0),
)
# Cards for which no table is shipped.
OTHERS = (
    _gpu("a30", "sm_80", 56, 165, 0.933),
    _gpu("a800", "sm_80", 108, 312, 2.039),
    _gpu("a40", "sm_86", 84, 149.7, 0.696),
    _gpu("rtx_a6000", "sm_86", 84, 154.8, 0.768),
    _gpu("rtx_3090", "sm_86", 82, 71, 0.936),
    _gpu("l4", "sm_89", 58, 121, 0.300),
    _gpu("l40", "sm_89", 142, 181, 0.864),
    _gpu("rtx_4090", "sm_89", 128, 165.2, 1.008),
    _gpu("gh200", "sm_90", 132, 989, 4.0),
    _gpu("h20", "sm_90", 78, 148, 4.0),
    _gpu("h800", "sm_90", 132, 989, 3.35),
    _gpu("gb200", "sm_100", 148, 2500, 8.0),
    _gpu("rtx_5080", "sm_120", 84, 112.6, 0.960),
    _gpu("mi300a", "gfx942", 228, 980.6, 5.3),
    _gpu("mi325x", "gfx942", 304, 1307, 6.0),
    _gpu("mi355x", "gfx950", 256, 2500, 8.0),
)


def known(target: Target, gpus: tuple[GPU, ...] = (*GPUS, *OTHERS)) -> GPU | None:
    """The known card that a target's name says it is."""
    words = set(_words(target))
    return next((gpu for gpu in gpus if gpu.target.arch == target.arch and set(gpu.words) <= words), None)


def table_name(target: Target) -> str:
    """The stem of a card's file: a shipped table's, else the card's name in lower case; "" without a name."""
    gpu = known(target, GPUS)
    return "_".join(_words(target)) if gpu is None else gpu.name


def nearest(target: Target) -> list[GPU]:
    """The shipped cards of a target's architecture, the nearest in processors and FLOP per byte of memory first.

        distance = |ln(processors / processors')| + |ln(FLOP per byte / FLOP per byte')|

    Few processors are filled by larger tiles, and few FLOP per byte leave time for smaller ones. For an unknown card
    torch tells the processors; without a device all are as far, and stay in the order of `GPUS`.
    """
    gpu = known(target)

    def distance(other: GPU) -> float:
        processors = target.processors if gpu is None else gpu.processors
        apart = abs(math.log(processors / other.processors)) if processors else 0.0
        return apart if gpu is None else apart + abs(math.log(gpu.flops_per_byte / other.flops_per_byte))

    return sorted((other for other in GPUS if other.target[:2] == target[:2]), key=distance)


def _words(target: Target) -> list[str]:
    return re.findall(r"[a-z0-9]+", target.card.lower())
