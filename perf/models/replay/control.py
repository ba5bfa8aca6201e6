"""Control codes: what ptxas tells the hardware about when an instruction may issue.

Volta and later encode an instruction in 128 bits, of which 105 to 125 hold its control code: Jia et al., Dissecting the
NVIDIA Volta GPU Architecture via Microbenchmarking (arXiv:1804.06826), section 2; Huerta et al., Analyzing Modern
NVIDIA GPU cores (arXiv:2503.20481), section 3.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ..static.control_flow import Listing, parse

_LOW = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/.*;\s*/\* 0x[0-9a-f]{16} \*/")
_HIGH = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
_NO_SCOREBOARD = 7


class Control(NamedTuple):
    """The control code of an instruction.

    stall    clocks until the warp may issue its next instruction
    writes   the scoreboard that is taken until the result is there, or None
    reads    the scoreboard that is taken until the operands were read, or None
    waits    the scoreboards that have to be free before it issues
    """

    stall: int
    writes: int | None
    reads: int | None
    waits: tuple[int, ...]


def decode(high: int) -> Control:
    """Decode the upper 64 bits of an instruction.

    >>> decode(0x000FE20000000F00)
    Control(stall=1, writes=None, reads=None, waits=())
    """
    writes, reads, waits = high >> 46 & 7, high >> 49 & 7, high >> 52 & 63
    return Control(
        high >> 41 & 15,
        None if writes == _NO_SCOREBOARD else writes,
        None if reads == _NO_SCOREBOARD else reads,
        tuple(board for board in range(6) if waits >> board & 1),
    )


def parse_with_controls(listing: str) -> tuple[Listing, list[Control]]:
    """Parse a listing by `nvdisasm -hex`: its instructions and labels, and the control code of each instruction."""
    code = parse(listing)
    controls: list[Control] = []
    is_inside = False
    for line in listing.splitlines():
        if is_inside and (found := _HIGH.match(line)):
            controls.append(decode(int(found[1], 16)))
        is_inside = bool(_LOW.match(line))
    if len(controls) != len(code.instructions):
        raise ValueError(f"listing: expected {len(code.instructions)} control codes, got {len(controls)}")
    return code, controls
