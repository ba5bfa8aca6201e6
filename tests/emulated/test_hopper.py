"""The forward in Gluon for sm_90, whose warps run different code: every form, in several orders of its warps."""

from __future__ import annotations

import linecache
from collections import Counter
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")
from ptx_emulator import PTXError, run
from ptx_emulator.instruction import Instruction
from ptx_emulator.parse import parse
from ptx_emulator.synchronisation import left_out, operation_of

import tritonattn
from tests.stub import Launched
from tests.support.slow import slow_but
from tests.support.versions import TRITON
from tritonattn.backends.triton import VARIANTS, launch
from tritonattn.tuning import TileConfig, lookup
from tritonattn.tuning.config import Problem, Target
from tritonattn.tuning.defaults import gluon_config

from .cases import Case
from .executor import GPU, Executor, is_ours
from .recorder import Launch, copied
from .test_varlen import MASKS, PACKED
from .test_varlen import Case as Varlen

pytestmark = pytest.mark.skipif(TRITON < (3, 6), reason="Gluon needs triton 3.6")

HALF, BFLOAT = torch.float16, torch.bfloat16
NAME = "attention_forward_hopper"
ORDERS = (("random", 1), ("last-warp", 0))
QUERY = ("query_scale",)
TERMS = ("query_scale", "key_scale", "key_bias", "sinks of rows")

# A fast selection: three consumers and two, every term of a logit; keys hidden from all rows, in a block at either end.
FAST: tuple[Case | Varlen, ...] = (
    Case(HALF, (64, 64), None, "wide sides, lengths and ranges", TERMS, "aux", (1, 1), (100, 360), 1),
    Case(BFLOAT, (64, 64), None, "wide causal window", (), "plain", (1, 1), (100, 300), 1),
    Varlen(BFLOAT, (64, 64), heads=(1, 1), gain=False),
)

# Masks, forms, head dims and their paddings in turn; FAST and CALL have the other masks.
EVERYTHING = [
    Case(HALF, (64, 64), None, "ranges", QUERY, "plain", (1, 2), (200, 140), 1),
    Case(HALF, (64, 64), None, "full", TERMS[:3], "softcap aux", (2, 1), (70, 420), 1),
    Case(BFLOAT, (128, 128), None, "an entry without keys", QUERY, "sinks", (2, 1), (130, 300), 1),
    Case(BFLOAT, (128, 128), None, "causal lengths", QUERY, "softcap aux", (2, 1), (130, 300), 1),
    Case(BFLOAT, (96, 112), None, "wide causal window", (), "aux", (1, 1), (130, 300), 1),
    Case(BFLOAT, (192, 192), None, "full", TERMS[:2], "plain", (1, 1), (130, 300), 1),
    Case(HALF, (256, 256), None, "causal ranges", (), "softcap", (1, 1), (130, 300), 1),
]
OF_PACKED = [
    Varlen(BFLOAT, (64, 64), packed="many", form="aux", heads=(1, 1)),
    Varlen(HALF, (128, 128), packed="long", mask="window", form="sinks"),
]
assert {one.mask for one in OF_PACKED} < MASKS.keys()
assert {one.packed for one in OF_PACKED} < PACKED.keys()


@dataclass(frozen=True)
class Hopper(GPU):
    """sm_90 with the forward in Gluon wherever it is legal."""

    def config(self, tiles: TileConfig | None):
        others = super().config(tiles)

        def config_for(kernel: str, problem: Problem, target: Target) -> TileConfig:
            in_gluon = gluon_config(problem, target) if kernel == "forward" else None
            return in_gluon or others(kernel, problem, target)

        return config_for


HOPPER = Hopper(90, descriptors=True)


class InOrders(Executor):
    """Runs launches of the kernel in several orders of its warps, which all give the same bits, and keeps them."""

    orders = ORDERS

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __call__(self, launched: Launched) -> None:
        if launched.name != NAME:
            super().__call__(launched)
            return
        kernel, grid, arguments, names = launched
        before, found = copied(arguments), []
        for policy, seed in self.orders:
            copies = copied(before)
            try:
                report = run(kernel, grid, copies, names=names, policy=policy, seed=seed)
            except PTXError as error:  # a deadlock
                raise AssertionError(f"{policy}: {error}") from error
            assert not any(map(is_ours, report.problems())), f"{policy}: {report}"
            found.append([one for one in copies if isinstance(one, torch.Tensor)])
        for other in found[1:]:
            for x, y in zip(other, found[0], strict=True):
                assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        for result, computed in zip(filter(torch.is_tensor, arguments), found[0], strict=True):
            result.copy_(computed)
        self.reports.append(report)
        self.launches.append(Launch(launched, before, report))


class InOneOrder(InOrders):
    """For forms of a kernel whose orders other cases compare; a race shows in any order."""

    orders = ORDERS[:1]


def check(case: Case | Varlen, emulate, gradients: bool = False, orders: type[InOrders] = InOrders) -> InOrders:
    """Hold the results of a case, and its gradients where asked for, to the bound of all backends."""
    executor = emulate(HOPPER, executor=orders)
    case.check(gradients)
    assert NAME in executor.launched
    return executor


@pytest.mark.parametrize("case", slow_but(FAST[1:2], FAST), ids=str)
def test_forward(case, emulate):
    check(case, emulate)


# Synchronising instructions that no run misses, by operation and function: how many in CALL's code, and the reason.
CALL = Case(BFLOAT, (128, 128), None, "causal", QUERY, "plain", (1, 1), (100, 650), 1)
IMPLIED = {
    ("fence.proxy", "_shared"): (1, "the emulator has no proxy of mbarriers: the fence must stay"),
    ("mbarrier.try_wait", "_step"): (4, "turns only order the issue of products"),
    ("bar.sync", "_step"): (4, "turns only order the issue of products"),
    ("mbarrier.try_wait", "_take"): (4, "the other consumer waited for the tile before it passed the turn"),
    ("mbarrier.try_wait", "_fill"): (1, "a ring's stages are empty at the start"),
    ("bar.sync", "attention_forward_hopper"): (2, "warps without a partition wait for the end"),
}


def function_of(one: Instruction, file: str) -> str:
    """The function of the kernel's file that an instruction comes from."""
    line = one.loc[1]
    while not linecache.getline(file, line).startswith("def "):
        line -= 1
    return linecache.getline(file, line)[4:].partition("(")[0]


def missed(launch: Launch) -> tuple[Counter, Counter]:
    """The synchronising instructions that a run misses, counted by operation; the others by operation and function."""
    kernel, found, implied = parse(launch.ptx), Counter(), Counter()
    file = VARIANTS["forward", "gluon"]().kernel.fn.__code__.co_filename
    for one in kernel.instructions:
        operation = operation_of(one)
        if operation is None:
            continue
        if launch.is_clean(left_out(kernel, one)):
            implied[operation, function_of(one, file)] += 1
        else:
            found[operation] += 1
    return found, implied


@pytest.fixture
def asked_by_environment(monkeypatch):
    monkeypatch.setenv(lookup.FORCE_GLUON, "1")
    for clear in (lookup.clear_cache, launch.forget_plans):
        clear()
    yield
    for clear in (lookup.clear_cache, launch.forget_plans):
        clear()


@pytest.mark.usefixtures("asked_by_environment")
@pytest.mark.parametrize("broken", ["import", "driver"])
def test_a_refusal_runs_the_other_forward(broken, emulate, monkeypatch):
    """With one warning; the driver's error comes at the launch."""
    executor = emulate(HOPPER)
    monkeypatch.setattr(launch, "config_for", lookup.config_for)
    run_on_device = launch.run

    def refusing(kernel, grid, arguments, config):
        if config.kernel == "gluon":
            raise RuntimeError("Triton Error [CUDA]: invalid argument")
        run_on_device(kernel, grid, arguments, config)

    def missing():
        raise ImportError("no such module")

    if broken == "import":
        monkeypatch.setitem(VARIANTS, ("forward", "gluon"), missing)
    else:
        monkeypatch.setattr(launch, "run", refusing)
    q, k, v = torch.randn(3, 1, 1, 20, 64, dtype=BFLOAT).unbind(0)
    with pytest.warns(UserWarning, match="TRITONATTN_GLUON: forward: .*(no such module|invalid argument)"):
        tritonattn.attention(q, k, v, backend="triton")
    assert executor.launched == ["attention_forward"]
