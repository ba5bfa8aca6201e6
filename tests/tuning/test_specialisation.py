"""What is compiled ahead of time: the arguments of a kernel by their names, and the target; nothing is compiled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from tritonattn.kernels import KERNELS
from tritonattn.tuning import Problem, Target, TileConfig, compile_kernel
from tritonattn.tuning import compile as ahead
from tritonattn.tuning.compile import constexpr_values, specialisation

TILES = TileConfig(64, 32, 4, 2)
PROBLEM = Problem(64, 128, torch.bfloat16)
SM_90, SM_100 = Target("cuda", "90"), Target("cuda", "100")


def types(kernel: str, problem: Problem, tiles: TileConfig = TILES) -> dict[str, str]:
    """Of the arguments that are no constants."""
    signature, _, _ = specialisation(KERNELS[kernel], problem, tiles, SM_90)
    return {name: text for name, text in signature.items() if text != "constexpr"}


@pytest.mark.parametrize(
    ("kernel", "option", "names"),
    [
        (
            "forward",
            "mask",
            {
                "mask_ptr": "*u8",
                "seen_ptr": "*u8",
                "mask_stride_b": "i32",
                "mask_stride_h": "i32",
                "mask_stride_q": "i32",
            },
        ),
        ("grad_key_value", "key_ranges", {"key_ranges_ptr": "*i32", "row_bounds_ptr": "*i32", "seen_ptr": "*u8"}),
        ("grad_query", "sequences", {"q_starts_ptr": "*i32", "k_starts_ptr": "*i32"}),
        ("grad_query", "query_scale_grad", {"d_query_scale_ptr": "*fp32"}),
        ("decode", "block_table", {"block_table_ptr": "*i32"}),
        ("forward", "grouped", {"group": "i32"}),
        ("forward", "aux", {"max_logit_ptr": "*fp32", "entropy_ptr": "*fp32"}),
    ],
)
def test_an_option_brings_its_arguments(kernel, option, names):
    without, given = types(kernel, PROBLEM), types(kernel, replace(PROBLEM, **{option: True}))
    assert {name: text for name, text in given.items() if name not in without} == names
    assert without.items() <= given.items()


def test_terms_of_scaled_rows_are_of_64_bits():
    scaled = replace(PROBLEM, query_scale=True)
    for kernel in ("row_terms", "grad_query", "grad_key_value"):
        assert (types(kernel, PROBLEM)["terms_ptr"], types(kernel, scaled)["terms_ptr"]) == ("*fp32", "*i64")


def test_pointers_and_strides_are_multiples_of_16():
    signature, constants, attributes = specialisation(KERNELS["forward"], PROBLEM, TILES, SM_90)
    found = {KERNELS["forward"].arg_names[position] for (position,) in attributes}
    assert found == {n for n in signature if ("_ptr" in n or "_stride_" in n) and n not in constants}
    assert {"q_ptr", "out_ptr", "k_stride_s"} <= found
    assert set(map(str, attributes.values())) == {"[['tt.divisibility', 16]]"}


def test_descriptors_are_of_the_streamed_blocks():
    """Of keys, of head dim 64 and value dim 128, or of rows."""
    described = replace(TILES, descriptors=True)
    forward, grad = (types(kernel, PROBLEM, described) for kernel in ("forward", "grad_key_value"))
    assert forward["k_descriptor"] == "tensordesc<bf16[1, 1, 32, 64]>"
    assert forward["v_descriptor"] == "tensordesc<bf16[1, 1, 32, 128]>"
    assert grad["q_descriptor"] == "tensordesc<bf16[1, 1, 64, 64]>"
    assert grad["d_out_descriptor"] == "tensordesc<bf16[1, 1, 64, 128]>"


def test_constants_follow_the_dtype_and_the_target():
    full = replace(PROBLEM, dtype=torch.float32)
    found = {
        (problem.dtype, target.name): constexpr_values(problem, TILES, target)
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
