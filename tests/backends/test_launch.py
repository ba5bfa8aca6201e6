"""The split of launches, and the arguments that they pass, on every device. No kernel runs."""

import operator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from tritonattn.backends.triton import KERNELS, device, launch, problem_of
from tritonattn.core.call import AttentionCall
from tritonattn.core.terms import Terms
from tritonattn.core.visibility import Visibility
from tritonattn.tuning.config import Problem, Target, TileConfig

CPU = torch.device("cpu")
TILES = TileConfig(64, 64, 4, 2)


LONG = [(3, 70_000, 2), (3, 2, 131_071)]  # past an axis of the hardware's grid
LARGE = [(258, 128, 65_535), (2**31 - 1, 2, 2), (40_000, 70_000, 3), (1, 65_535, 32_769)]


@pytest.mark.parametrize("grid", [*LARGE, *LONG])
def test_grids_of_more_programs_than_triton_counts_take_several_launches(grid, monkeypatch):
    """Its launcher multiplies the axes in 32 bits, and takes a product that is not positive for an empty grid."""
    seen = []
    monkeypatch.setattr(launch, "run", lambda kernel, part, arguments, config: seen.append((part, arguments)))
    names = ("first_y", "x", "first_z", "WIDE", "BLOCK_M")
    in_order, constants = operator.itemgetter(*names[:3]), ((False, 64), (True, 64))
    problem, target = Problem(64, 64, torch.float16), Target("cuda", "80")
    made = launch.Plan(print, TILES, problem, target, names, in_order, (), (), constants, None)
    made.launch(grid, {"x": 5, "y": 6})
    assert list(seen[0][1].items()) == list(zip(names, (0, 5, 0, False, 64), strict=True)), "in the kernel's order"
    x, y, z = grid
    covered = 0
    for part, first in seen:
        assert part[0] == x, "programs that start one after another"
        assert part[0] * part[1] * part[2] < 2**31
        assert max(part[1:]) <= 65_535
        assert first["first_y"] + part[1] <= y
        assert first["first_z"] + part[2] <= z
        covered += part[1] * part[2]
    assert covered == y * z
    assert len({tuple(first.items()) for _, first in seen}) == len(seen)


def test_recorded_launches_are_not_run(monkeypatch):
    """Launches of one context alone, as on another card."""
    monkeypatch.setattr(launch, "run", lambda *_: pytest.fail("ran"))
    monkeypatch.setattr(launch, "config_for", lambda *_: pytest.fail("asked"))
    specialisation = device.Specialisation(Problem(64, 64, torch.float16), False)
    with launch.recording(Target("cuda", "100"), lambda *_: TILES) as launches:
        launch.plan("row_terms", specialisation, CPU).launch(
            (3, 2, 1), dict.fromkeys(KERNELS["row_terms"].arg_names, 7)
        )
        with ThreadPoolExecutor(1) as pool, pytest.raises(pytest.fail.Exception, match="asked"):
            pool.submit(launch.plan, "row_terms", specialisation, CPU).result()
    assert [(one.kernel, one.grid, one.config) for one in launches] == [(KERNELS["row_terms"], (3, 2, 1), TILES)]
    assert launches[0].arguments["BLOCK_M"] == 64


def test_a_config_is_for_its_kernel_and_for_calls_that_it_is_legal_for(monkeypatch):
    monkeypatch.setattr(launch, "config_for", lambda *_: TILES)
    problems = (Problem(256, 256, dtype) for dtype in (torch.float16, torch.float32))
    half, single = (device.Specialisation(problem, False) for problem in problems)
    meant = TileConfig(128, 64, 8, 2)
    with launch.configured("forward", meant):
        asked = (("forward", half), ("forward", single), ("decode", half))
        found = [launch.plan(*one, CPU).config for one in asked]
    assert found == [meant, TILES, TILES], "in fp32 it takes more shared memory than there is"
    assert launch.plan("forward", half, CPU).config == TILES


@pytest.mark.parametrize("lengths", [(1024, 1024), (1, 1024), (1025, 1), (1, 1025)])
def test_short_calls_have_at_most_1024_rows_and_keys(lengths):
    q, k = (torch.empty((1, 1, length, 16), device="meta") for length in lengths)
    assert problem_of(AttentionCall(q, k, k, Visibility.of(q, k), Terms())).short == (max(lengths) <= 1024)


@pytest.mark.parametrize(
    ("width", "strides", "wide"),
    [(64, (2**21 - 1, 1), False), (64, (2**21, 1), True), (2, (16, 2**30 - 2**14), False), (2, (16, 2**30), True)],
)
def test_offsets_in_a_tile_of_1024_rows_that_pass_int32(width, strides, wide):
    x = torch.empty(0).as_strided((0, 1, 1, width), (1, 1, *strides))
    assert launch.is_wide(x, None) == launch.is_wide(None, x) == wide
    assert not launch.is_wide(None)


def test_code_that_spills_is_launched_no_more_where_its_entry_is_of_another_triton(monkeypatch):
    """The call that compiled it has its results; the plan of the next is made again."""
    problem, compiled, asked = Problem(64, 64, torch.float16), SimpleNamespace(n_spills=3), []
    kernel, specialisation = KERNELS["forward"], device.Specialisation(problem, False)
    arguments = device.KernelArguments(("q",), (torch.zeros(1),), specialisation)
    monkeypatch.setattr(launch, "launch_on", lambda *_: compiled)
    monkeypatch.setattr(launch.lookup, "refuse_spills", lambda *of: asked.append(of) or len(asked) == 2)
    plan = launch.plan("forward", specialisation, CPU)
    for is_kept in (True, False):
        launch.run_on_device(kernel, (1, 1, 1), arguments, TILES)
        assert (launch.plan("forward", specialisation, CPU) is plan) == is_kept
    assert asked == [("forward", problem, Target("cuda", "80"), TILES, 3)] * 2
    for nothing in (None, SimpleNamespace(n_spills=0)):
        monkeypatch.setattr(launch, "launch_on", lambda *_, found=nothing: found)
        launch.run_on_device(kernel, (1, 1, 1), arguments, TILES)
    assert len(asked) == 2
