"""Programs take every block of every head of every member once, in the order that the model of perf assumes."""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
import triton
import triton.language as tl

import tritonattn
from perf import schedule
from tritonattn.backends.triton import launch
from tritonattn.backends.triton.block import program_in_section
from tritonattn.tuning.config import Target
from tritonattn.tuning.order import heads_of_section


@triton.jit
def positions(out, heads, first_y, first_z, LAST_FIRST: tl.constexpr, LANES: tl.constexpr):
    """out int32 [programs, 3], in the order in which programs start."""
    block, head, member = program_in_section(heads, first_y, first_z, LAST_FIRST, LANES)
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = out + 3 * ((z * tl.num_programs(1) + y) * tl.num_programs(0) + x)
    tl.store(place, block)
    tl.store(place + 1, head)
    tl.store(place + 2, member)


def started(device, grid, heads, last_first=True, lanes=1, first=(0, 0)) -> list[tuple[int, ...]]:
    out = torch.full((grid[0] * grid[1] * grid[2], 3), -1, dtype=torch.int32, device=device)
    positions[grid](out, heads, *first, last_first, lanes)
    return list(map(tuple, out.tolist()))


SHAPES = {
    "batch": (3, 4, 4, 200),
    "shared key heads": (2, 8, 2, 130),
    "eight dies": (2, 16, 4, 70),
    "a head": (1, 1, 1, 300),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_kernel_of_a_call_covers_its_blocks(name, target, device, monkeypatch):
    """Also where the cache holds few heads, and where the sequences are packed."""
    batch, heads, kv_heads, length = SHAPES[name]
    q, k = (torch.empty(batch, n, length, 64, dtype=torch.bfloat16, device="meta") for n in (heads, kv_heads))
    packed = [x.transpose(0, 1).flatten(1, 2).transpose(0, 1) for x in (q, k, k)]
    starts = torch.arange(batch + 1, dtype=torch.int32, device="meta") * length
    target = Target.parse(target)
    for x in (q, k, *packed):
        x.requires_grad_()
    for cache in (2**12, 2**16, 2**30):
        monkeypatch.setitem(tritonattn.tuning.order._L2_BYTES, target.arch, cache)
        heads_of_section.cache_clear()
        with launch.recording(target) as launches:
            out = tritonattn.attention(q, k, k, causal=True, backend="triton")
            out.backward(torch.empty_like(out))
            out = tritonattn.attention_varlen(*packed, starts, starts, length, length, causal=True, backend="triton")
            out.backward(torch.empty_like(out))
        ordered = [one for one in launches if "LANES" in one.arguments]
        assert len(ordered) == 6
        for one in ordered:
            is_of_keys = one.kernel.__name__ == "attention_grad_key_value"
            own, size = (kv_heads, one.config.block_n) if is_of_keys else (heads, one.config.block_m)
            found = started(device, one.grid, own, not is_of_keys, one.arguments["LANES"])
            assert sorted(found) == list(product(range(-(-length // size)), range(own), range(batch)))
    heads_of_section.cache_clear()


def test_every_order_gives_the_same_bits(device, monkeypatch):
    """A config's share of the cache says how many of 6 heads run side by side."""
    q, k, v = torch.randn(3, 3, 2, 40, 16, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    monkeypatch.setitem(tritonattn.tuning.order._L2_BYTES, Target.of(device).arch, 2 * 40 * (16 + 16) * 4)
    heads_of_section.cache_clear()
    default, run, sections, found = launch.config_for, launch.run, set(), []

    def watch(kernel, grid, arguments, config):
        if "LANES" in arguments:
            sections.add((config.l2_percent, grid[0], grid[2]))
        run(kernel, grid, arguments, config)

    def of_order(percent, *asked):
        return replace(default(*asked), l2_percent=percent)

    monkeypatch.setattr(launch, "run", watch)
    for percent in (50, 100, 400):
        monkeypatch.setattr(launch, "config_for", partial(of_order, percent))
        out = tritonattn.attention(q, k, v, causal=True, backend="triton", scaling="key_norm_mean")
        found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert sections == {(50, 1, 6), (100, 2, 3), (400, 6, 1)}
    assert all(map(torch.equal, found[0] + found[1], found[1] + found[2]))
    heads_of_section.cache_clear()


@pytest.mark.parametrize(("gpu", "heads", "length"), [("h100", 12, 256), ("mi300x", 16, 256), ("mi300x", 12, 384)])
def test_the_model_of_perf_has_the_order_of_the_kernels(gpu, heads, length, device):
    case = schedule.Case(gpu, 64, length, heads)
    grid = (case.section, case.blocks, heads // case.section)
    found = started(device, grid, heads, lanes=schedule.lanes(case.target))
    assert [(head, block) for block, head, _ in found] == list(schedule.in_sections(case))


def test_launches_of_a_grid_past_the_limit_of_its_axes_cover_all_of_it(device, monkeypatch):
    monkeypatch.setattr(launch, "LONGEST_AXIS", 2)
    found = [place for part, y, z in launch._parts(2, 5, 9) for place in started(device, part, 6, first=(y, z))]
    assert sorted(found) == list(product(range(5), range(6), range(3)))


def test_heads_of_a_section_divide_all_heads():
    h100, mi300x, mib = Target.parse("sm_90"), Target.parse("gfx942"), 2**20
    assert heads_of_section(32, 8 * mib, h100) == 4, "50 MiB hold 6"
    assert heads_of_section(7, 20 * mib, h100) == 1, "7 are more than twice as many as fit"
    assert heads_of_section(14, 12 * mib, h100) == 7, "2 of the 4 that fit leave half of the cache empty"
    assert heads_of_section(32, 2**30, h100) == 1
    assert heads_of_section(32, 4 * mib, mi300x) == 8, "a head a die"
    assert heads_of_section(32, mib, mi300x) == 32, "four heads a die"
    assert heads_of_section(12, mib, mi300x) == 12, "three heads a die"
    assert heads_of_section(2**20, 2**30, h100) == 32, "a grid's axis holds 65,535 sections"
    assert heads_of_section(0, 5, h100) == 1
