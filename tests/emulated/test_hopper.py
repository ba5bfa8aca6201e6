"""The forward in Gluon for sm_90, whose warps run different code: every form, in several orders of its warps."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

pytest.importorskip("triton")
from tests.emulator import run
from tests.emulator.parse import parse
from tests.emulator.synchronisation import kind_of, without
from tests.stub import Launched
from tests.support.versions import TRITON
from tritonattn.backends.triton.launch import configured
from tritonattn.tuning import TileConfig

from .cases import Case
from .executor import GPU, Executor
from .recorder import Launch, copied

pytestmark = pytest.mark.skipif(TRITON < (3, 6), reason="Gluon needs triton 3.6")

HALF, BFLOAT = torch.float16, torch.bfloat16
NAME = "attention_forward_hopper"
ORDERS = (("random", 1), ("last-warp", 0), ("round-robin", 0))


def gluon(rows: int, keys: int = 128) -> TileConfig:
    return TileConfig(rows, keys, 4, 2, descriptors=True, kernel="gluon")


THREE, TWO, WIDE = gluon(192), gluon(128), gluon(128, 64)

# A fast selection: three consumers and two, every term of a logit, keys that no row sees.
TERMS = ("query_scale", "key_scale", "key_bias", "sinks")
FAST = (
    Case(BFLOAT, (64, 64), THREE, "causal", ("query_scale",), "aux", (1, 1), (200, 330), 1),
    Case(HALF, (64, 64), TWO, "sides, lengths and ranges", TERMS, "softcap aux", (1, 1), (140, 420), 1),
)


class InOrders(Executor):
    """Runs launches of the kernel in several orders of its warps, which all give the same bits, and keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __call__(self, launched: Launched) -> None:
        if launched.name != NAME:
            super().__call__(launched)
            return
        kernel, grid, arguments, names = launched
        before, found = copied(arguments), []
        for policy, seed in ORDERS:
            own = copied(before)
            report = run(kernel, grid, own, names=names, policy=policy, seed=seed)
            assert report.ok, f"{policy}: {report}"
            found.append([one for one in own if isinstance(one, torch.Tensor)])
        for other in found[1:]:
            for x, y in zip(other, found[0], strict=True):
                assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        for result, own in zip(filter(torch.is_tensor, arguments), found[0], strict=True):
            result.copy_(own)
        self.reports.append(report)
        self.launches.append(Launch(launched, before, report))


def check(case, emulate, gradients: bool = False) -> InOrders:
    """Hold the results of a case, and its gradients, to the bound of all backends."""
    executor = emulate(GPU(90, descriptors=True), kind=InOrders)
    with configured("forward", case.tiles):
        case.check(gradients)
    assert NAME in executor.launched
    return executor


@pytest.mark.parametrize("case", FAST, ids=str)
def test_forward(case, emulate):
    check(case, emulate)


def missed(launch: Launch, each: bool) -> tuple[Counter, list]:
    """How many synchronising instructions of each kind a run misses, each or the first of a kind, and the others."""
    kernel, found, others = parse(launch.ptx), Counter(), []
    for one in kernel.instructions:
        kind = kind_of(one)
        if kind is None or (found[kind] and not each):
            continue
        if launch.is_clean(without(launch.ptx, kernel, one)):
            others.append((kind, kernel.where(one)))
        else:
            found[kind] += 1
    return found, others
