"""Arguments of ahead-of-time compilation: a launch on tensors without memory; nothing is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget

from tritonattn.backends.triton import compile as ahead
from tritonattn.backends.triton import device, launch
from tritonattn.kernels import KERNELS
from tritonattn.tuning import Problem, Target, TileConfig, compile_kernel

TILES = TileConfig(64, 32, 4, 2)
PROBLEM = Problem(64, 128, torch.bfloat16)
SM_90, SM_100 = Target("cuda", "90"), Target("cuda", "100")

pytestmark = pytest.mark.skipif(launch.interpreting, reason="TRITON_INTERPRET=1 leaves nothing to compile")


def source_of(kernel: str, problem: Problem, tiles: TileConfig = TILES):
    asked = ahead.launch_of(kernel, problem, tiles, SM_90)
    return asked, ahead.specialised(
        asked.kernel, asked.arguments, device.compile_options(tiles), GPUTarget("cuda", 90, 32)
    )


def types(kernel: str, problem: Problem, tiles: TileConfig = TILES) -> dict[str, str]:
    """Types of the arguments that are no constants; "mask.b" is a member of a record."""
    asked, source = source_of(kernel, problem, tiles)
    return {
        name: kind
        for argument, value in asked.arguments.items()
        for name, kind in members(argument, value, source.signature[argument])
        if kind != "constexpr"
    }


def members(name: str, value: Any, kind: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(kind, tuple):
        yield name, kind
        return
    for field, member, its_kind in zip(value._fields, value, kind, strict=True):
        yield from members(f"{name}.{field}", member, its_kind)


MASK = {"mask.ptr": "*u8", "mask.b": "i32", "mask.h": "i32", "mask.s": "i32", "seen_ptr": "*u8"}


@pytest.mark.parametrize(
    ("kernel", "option", "names"),
    [
        ("forward", "mask", MASK),
        ("grad_key_value", "key_ranges", {"ranges.key_ranges": "*i32", "row_bounds_ptr": "*i32", "seen_ptr": "*u8"}),
        ("grad_query", "sequences", {"starts.q": "*i32", "starts.k": "*i32"}),
        ("grad_query", "query_scale_grad", {"d_query_scale_ptr": "*fp32"}),
        ("decode", "block_table", {"block_table_ptr": "*i32"}),
        ("forward", "grouped", {"group": "i32"}),
        ("forward", "rounding", {"results.rounding": "*bf16"}),
        ("row_terms", "rounding", {"results.rounding": "*bf16"}),
        ("forward", "aux", {"results.max_logit": "*fp32", "results.entropy": "*fp32"}),
        ("grad_query", "aux", {"d_lse_ptr": "*fp32"}),
    ],
)
def test_an_option_brings_its_arguments(kernel, option, names):
    without, given = types(kernel, PROBLEM), types(kernel, replace(PROBLEM, **{option: True}))
    assert {name: text for name, text in given.items() if name not in without} == names
    assert without.items() <= given.items()


def test_terms_of_scaled_rows_are_of_64_bits():
    scaled = replace(PROBLEM, query_scale=True)
    for kernel in ("row_terms", "grad_query", "grad_key_value"):
        assert (types(kernel, PROBLEM)["terms.both"], types(kernel, scaled)["terms.both"]) == ("*fp32", "*i64")


def test_pointers_and_strides_are_multiples_of_16_but_for_unaligned_rows():
    names = KERNELS["forward"].arg_names
    q = names.index("q")
    divisible = [["tt.divisibility", 16]]
    _, aligned = source_of("forward", PROBLEM)
    _, unaligned = source_of("forward", replace(PROBLEM, aligned=False))
    assert [aligned.attrs[q, member] for member in range(4)] == [divisible] * 4
    assert aligned.constants[q, 4] == 1
    assert unaligned.attrs[q, 0] == divisible
    assert not any(unaligned.attrs.get((q, member)) for member in (3, 4))
    assert not aligned.attrs.get((names.index("q_len"),)), "lengths are not specialised"


def test_descriptors_are_of_the_streamed_blocks():
    """Blocks of keys, of head dim 64 and value dim 128, or of rows."""
    described = replace(TILES, descriptors=True)
    forward, grad = (types(kernel, PROBLEM, described) for kernel in ("forward", "grad_key_value"))
    assert forward["k_descriptor"].startswith("tensordesc<bf16[1, 1, 32, 64]")
    assert forward["v_descriptor"].startswith("tensordesc<bf16[1, 1, 32, 128]")
    assert grad["q_descriptor"].startswith("tensordesc<bf16[1, 1, 64, 64]")
    assert grad["d_out_descriptor"].startswith("tensordesc<bf16[1, 1, 64, 128]")


def test_constants_follow_the_dtype_and_the_target():
    full = replace(PROBLEM, dtype=torch.float32)
    found = {
        (problem.dtype, target.name): launch.constexpr_values(problem, TILES, target)
        for problem in (PROBLEM, full)
        for target in (SM_90, SM_100)
    }
    assert {key for key, values in found.items() if values["CORRECT_DELTA"]} == {
        (full.dtype, "sm_90"),
        (full.dtype, "sm_100"),
    }
    assert {name for (_, name), values in found.items() if values["SPLIT_TERMS"]} == {"sm_100"}
    assert {key for key, values in found.items() if values["SUM_COLUMNS"] == 8} == {(PROBLEM.dtype, "sm_90")}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("sm_90", ("cuda", 90, 32)), ("gfx942", ("hip", "gfx942", 64)), ("gfx1100", ("hip", "gfx1100", 32))],
)
def test_lanes_of_a_target(name, wanted, monkeypatch):
    seen = []
    monkeypatch.setattr(ahead.triton, "compile", lambda source, target, options: seen.append((target, options)))
    compile_kernel("forward", PROBLEM, TILES, name)
    [(target, options)] = seen
    assert (target.backend, target.arch, target.warp_size) == wanted
    assert options == {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
