"""How launches are split, and which arguments they pass: what holds on every device. No kernel runs."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("triton")
from tritonattn.backends.triton import launch
from tritonattn.kernels import KERNELS
from tritonattn.tuning.config import Problem, Target, TileConfig

CPU, SM_80 = torch.device("cpu"), Target("cuda", "80")
TILES = TileConfig(64, 64, 4, 2)


@pytest.mark.parametrize(
    ("heads", "members", "parts"),
    [
        (70_000, 2, [(0, 65_535, 0, 2), (65_535, 4_465, 0, 2)]),
        (2, 131_071, [(0, 2, 0, 65_535), (0, 2, 65_535, 65_535), (0, 2, 131_070, 1)]),
    ],
)
def test_long_axes_of_a_grid_take_several_launches(heads, members, parts, monkeypatch):
    """All heads and members are covered once, and no axis is longer than a card takes."""
    seen = []
    monkeypatch.setattr(launch, "run", lambda kernel, grid, arguments, config: seen.append((grid, arguments)))
    names = ("first_head", "x", "first_member", "WIDE", "BLOCK_M")
    launch.Plan.of(print, TILES, names, {"BLOCK_M": 64}).launch((3, heads, members), {"x": 5, "y": 6}, True)
    assert {blocks for (blocks, _, _), _ in seen} == {3}
    assert max(max(grid) for grid, _ in seen) <= 65_535
    covered = [(first["first_head"], heads, first["first_member"], members) for (_, heads, members), first in seen]
    assert covered == parts
    first = {"first_head": 0, "x": 5, "first_member": 0, "WIDE": True, "BLOCK_M": 64}
    assert list(seen[0][1].items()) == list(first.items()), "in the kernel's order"


@pytest.mark.parametrize("grid", [(258, 128, 65_535), (2**31 - 1, 2, 2), (40_000, 70_000, 3), (1, 65_535, 32_769)])
def test_grids_of_more_programs_than_triton_counts_take_several_launches(grid, monkeypatch):
    """Its launcher multiplies the axes in 32 bits, and takes a product that is not positive for an empty grid."""
    seen = []
    monkeypatch.setattr(launch, "run", lambda kernel, part, arguments, config: seen.append((part, arguments)))
    launch.Plan.of(print, TILES, ("first_head", "first_member"), {}).launch(grid, {}, False)
    blocks, heads, members = grid
    covered = 0
    for part, first in seen:
        assert part[0] == blocks, "which kernels count from the last"
        assert part[0] * part[1] * part[2] < 2**31
        assert first["first_head"] + part[1] <= heads
        assert first["first_member"] + part[2] <= members
        covered += part[1] * part[2]
    assert covered == heads * members
    assert len({tuple(first.items()) for _, first in seen}) == len(seen)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_lengths_are_bounded_whatever_holds_them(dtype):
    far = torch.iinfo(dtype).max
    found = launch.bounded(torch.tensor([-far, -1, 0, 100, far], dtype=dtype), 70_000)
    assert found.dtype == torch.int32
    assert found.tolist() == [0, 0, 0, 100, min(far, 70_000)]


def test_recorded_launches_are_not_run(monkeypatch):
    """Launches of one context alone, as on another card."""
    monkeypatch.setattr(launch, "run", lambda *_: pytest.fail("ran"))
    monkeypatch.setattr(launch, "config_for", lambda *_: pytest.fail("asked"))
    problem = Problem(64, 64, torch.float16)
    with launch.recording(Target("cuda", "100"), lambda *_: TILES) as launches:
        launch.plan("row_terms", problem, CPU).launch(
            (3, 2, 1), dict.fromkeys(KERNELS["row_terms"].arg_names, 7), False
        )
        with ThreadPoolExecutor(1) as pool, pytest.raises(pytest.fail.Exception, match="asked"):
            pool.submit(launch.plan, "row_terms", problem, CPU).result()
    assert [(one.kernel, one.grid, one.config) for one in launches] == [(KERNELS["row_terms"], (3, 2, 1), TILES)]
    assert launches[0].arguments["BLOCK_M"] == 64


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (RuntimeError("PassManager::run failed"), True),
        (launch.TritonError("out of resource"), True),
        (RuntimeError("an illegal memory access was encountered"), False),
    ],
    ids=repr,
)
def test_the_next_config_is_planned_after_a_refusal_alone(error, again, monkeypatch):
    configs = [TILES, TileConfig(32, 32, 4, 1)]
    monkeypatch.setattr(launch, "config_for", lambda *_: configs[0])
    monkeypatch.setattr(launch.lookup, "reject_config", lambda *given: configs.pop(0) == given[3])

    def launches(plan):
        if plan.config == TILES:
            raise error
        return plan.config

    problem = Problem(64, 64, torch.float16)
    if again:
        assert launch.planned("forward", problem, CPU, launches) == TileConfig(32, 32, 4, 1)
    else:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            launch.planned("forward", problem, CPU, launches)
        assert configs[0] == TILES


def test_a_config_is_for_its_kernel_and_for_calls_that_it_is_legal_for(monkeypatch):
    monkeypatch.setattr(launch, "config_for", lambda *_: TILES)
    problem, single = Problem(256, 256, torch.float16), Problem(256, 256, torch.float32)
    meant = TileConfig(128, 64, 8, 2)
    with launch.configured("forward", meant):
        asked = (("forward", problem), ("forward", single), ("decode", problem))
        found = [launch.plan(*one, CPU).config for one in asked]
    assert found == [meant, TILES, TILES], "in fp32 it takes more shared memory than there is"
    assert launch.plan("forward", problem, CPU).config == TILES


@pytest.mark.parametrize(
    ("width", "strides", "wide"),
    [(64, (2**21 - 1, 1), False), (64, (2**21, 1), True), (2, (16, 2**30 - 2**14), False), (2, (16, 2**30), True)],
)
def test_offsets_in_a_tile_of_1024_rows_that_pass_int32(width, strides, wide):
    x = torch.empty(0).as_strided((0, 1, 1, width), (1, 1, *strides))
    assert launch.is_wide(x, None) == launch.is_wide(None, x) == wide
    assert not launch.is_wide(None)
