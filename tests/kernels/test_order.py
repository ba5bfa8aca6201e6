"""Programs take every block of every head of every sequence once, in the order that the model of perf assumes."""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
import triton
import triton.language as tl

import tritonattn
from perf.models import schedule
from tritonattn.backends.triton import launch
from tritonattn.backends.triton.block import program_in_section
from tritonattn.backends.triton.device import grids_of
from tritonattn.tuning.architectures import ARCHITECTURES
from tritonattn.tuning.config import Target
from tritonattn.tuning.order import Sections, sections


@triton.jit
def positions(out, heads, first_head, first_y, first_z, LAST_FIRST: tl.constexpr, NUM_XCDS: tl.constexpr):
    """out int32 [programs, 3], in the order in which programs start."""
    block, head, sequence = program_in_section(heads, first_head, first_y, first_z, LAST_FIRST, NUM_XCDS)
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pointer = out + 3 * ((z * tl.num_programs(1) + y) * tl.num_programs(0) + x)
    tl.store(pointer, block)
    tl.store(pointer + 1, head)
    tl.store(pointer + 2, sequence)


def started(device, grid, heads, first_head=0, last_first=True, dies=1, first=(0, 0)) -> list[tuple[int, ...] | None]:
    """(block, head, sequence) of each program, None where it has no head."""
    out = torch.full((grid[0] * grid[1] * grid[2], 3), -1, dtype=torch.int32, device=device)
    positions[grid](out, heads, first_head, *first, last_first, dies)
    return [None if one[2] < 0 else tuple(one) for one in out.tolist()]


SHAPES = {
    "batch": (3, 4, 4, 200),
    "shared key heads": (2, 8, 2, 130),
    "eight dies": (2, 16, 4, 70),
    "heads that no section divides": (1, 11, 11, 70),
    "a head": (1, 1, 1, 300),
}


def _with_cache(monkeypatch, target, size):
    monkeypatch.setitem(ARCHITECTURES, target.arch, replace(target.architecture, l2_bytes=size))
    sections.cache_clear()


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
        _with_cache(monkeypatch, target, cache)
        with launch.recording(target) as launches:
            out = tritonattn.attention(q, k, k, causal=True, backend="triton")
            out.backward(torch.empty_like(out))
            out = tritonattn.attention_varlen(*packed, starts, starts, length, length, causal=True, backend="triton")
            out.backward(torch.empty_like(out))
        ordered = [one for one in launches if "NUM_XCDS" in one.arguments]
        assert len(ordered) == 6
        for one in ordered:
            is_of_keys = one.kernel.__name__ == "attention_grad_key_value"
            of_kernel, size = (kv_heads, one.config.block_n) if is_of_keys else (heads, one.config.block_m)
            first, dies = one.arguments["first_head"], one.arguments["NUM_XCDS"]
            found = started(device, one.grid, of_kernel, first, not is_of_keys, dies)
            assert sorted(filter(None, found)) == list(
                product(range(-(-length // size)), range(of_kernel), range(batch))
            )
    sections.cache_clear()


def test_every_order_gives_the_same_bits(device, monkeypatch):
    """A config's share of the cache says how many of 5 heads run side by side: 1, 3 after a section of 2, or all."""
    q, k, v = torch.randn(3, 5, 1, 40, 16, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    _with_cache(monkeypatch, Target.of(device), 2 * 40 * (16 + 16) * 4)
    default, run, orders, found = launch.config_for, launch.run, set(), []

    def watch(kernel, grid, arguments, config):
        if "NUM_XCDS" in arguments:
            orders.add((config.l2_percent, grid[0], grid[2], arguments["first_head"]))
        run(kernel, grid, arguments, config)

    def of_order(percent, *asked):
        return replace(default(*asked), l2_percent=percent)

    monkeypatch.setattr(launch, "run", watch)
    for percent in (50, 100, 400):
        monkeypatch.setattr(launch, "config_for", partial(of_order, percent))
        out = tritonattn.attention(q, k, v, causal=True, backend="triton", scaling="key_norm_mean")
        found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert orders == {(50, 1, 5, 0), (100, 3, 2, -1), (400, 5, 1, 0)}
    assert all(torch.equal(x, y) for one in found[1:] for x, y in zip(found[0], one, strict=True))
    sections.cache_clear()


@pytest.mark.parametrize(
    ("gpu", "heads", "length"), [("h100", 12, 256), ("h100", 13, 2**13), ("mi300x", 16, 256), ("mi300x", 45, 2**12)]
)
def test_the_model_of_perf_has_the_order_of_the_kernels(gpu, heads, length, device):
    case = schedule.Case(gpu, 128, length, heads)
    size, count = case.sections
    grid, dies = (size, case.blocks, count), case.target.architecture.dies
    found = started(device, grid, heads, heads - size * count, dies=dies)
    assert [one and (one[1], one[0]) for one in found] == list(schedule.in_sections(case))


def test_launches_of_a_grid_past_the_limit_of_its_axes_cover_all_of_it(device, monkeypatch):
    monkeypatch.setattr("tritonattn.backends.triton.device.LONGEST_AXIS", 2)
    parts = grids_of(2, 5, 9)
    found = [one for part, y, z in parts for one in started(device, part, 17, -1, first=(y, z))]
    assert sorted(filter(None, found)) == list(product(range(5), range(17), range(1)))


def test_sections_fill_the_cache():
    h100, mi300x, mib = Target.parse("sm_90"), Target.parse("gfx942"), 2**20
    assert sections(32, 8 * mib, h100) == Sections(7, 5), "50 MiB hold 6, and 5 times 6 is nearest to 32"
    assert sections(7, 20 * mib, h100) == Sections(2, 4), "50 MiB hold 2"
    assert sections(17, 4 * mib, h100) == Sections(17, 1), "1.4 times as many as fit"
    assert sections(32, 2**30, h100) == Sections(1, 32)
    assert sections(32, 8 * mib, mi300x) == Sections(8, 4), "a head per die"
    assert sections(35, 8 * mib, mi300x) == Sections(8, 5), "three heads are shared by the dies"
    assert sections(20, 2 * mib, mi300x) == Sections(24, 1), "three heads a die"
    assert sections(0, 5, h100).count == 0
