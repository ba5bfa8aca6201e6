"""The memory of the race checks against its definition: every pair of accesses compared."""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np
import pytest
from ptx_emulator.shadow import CTA_BITS, Shadow

CTAS, WARPS = 2, 3


class Access(NamedTuple):
    """One warp's access to the one cell, between the barriers `epoch` and `epoch + 1` of its CTA."""

    cta: int
    epoch: int
    warp: int
    action: str

    @property
    def key(self) -> int:
        return (self.cta + 1 << int(CTA_BITS)) | (self.epoch + 1) << 8 | self.warp

    def conflicts(self, other: Access) -> bool:
        if self.action == other.action and self.action in ("read", "atomic"):
            return False
        return self.cta != other.cta or (self.epoch == other.epoch and self.warp != other.warp)


def _found(shadow: Shadow, together: list[Access]) -> bool:
    """True where the shadow reports a conflict of accesses of the same action, made by one instruction."""
    actors, cells = np.array([one.key for one in together]), np.zeros(len(together), np.int64)
    if together[0].action == "read":
        return shadow.read(cells, actors, 0) is not None
    with_write, with_read, within, _ = shadow.write(cells, actors, 0, atomic=together[0].action == "atomic")
    return any(found is not None for found in (with_write, with_read, within))


def _instructions(generator: random.Random, ctas: int) -> list[list[Access]]:
    """Up to ten instructions of random warps; now and then a CTA passes a barrier."""
    result, epochs = [], [0] * ctas
    favourite = generator.choice(["read", "write", "atomic"])
    for _ in range(generator.randint(2, 10)):
        action = favourite if generator.random() < 0.7 else generator.choice(["read", "write", "atomic"])
        everyone = [(cta, warp) for cta in range(ctas) for warp in range(WARPS)]
        chosen = generator.sample(everyone, generator.choice([1, 1, 1, 2]))
        result.append([Access(cta, epochs[cta], warp, action) for cta, warp in chosen])
        if generator.random() < 0.4:
            epochs[generator.randrange(ctas)] += 1
    return result


@pytest.mark.parametrize("local", [True, False], ids=["shared", "global"])
def test_a_conflict_is_found_when_and_only_when_it_arises(local):
    generator, conflicts = random.Random(0), 0
    for _ in range(1500):
        shadow, before = Shadow(1, local), []
        for together in _instructions(generator, 1 if local else CTAS):
            earlier = [*before, *together]
            expected = any(one.conflicts(other) for one in together for other in earlier)
            found = _found(shadow, together)
            assert found == expected, (before, together)
            if found:
                conflicts += 1
                break
            before = earlier
    assert 200 < conflicts < 1300
