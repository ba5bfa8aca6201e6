"""Defaults of calls that take more registers, and of targets that no table of tiles names; nothing is compiled."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from tritonattn.tuning.config import Problem, Target, TileConfig, legal_reasons
from tritonattn.tuning.defaults import default_config, obstacle

TARGETS = [Target.parse(name) for name in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")]
HALF, FULL = torch.float16, torch.float32


def problem(width: int, dtype: torch.dtype = HALF, **forms) -> Problem:
    return Problem(width, width, dtype, right=True, **forms)


def values(kernel: str, config: TileConfig, width: int) -> float:
    """The logits of a tile and the sums held, per warp."""
    held = config.block_n * 2 if kernel == "grad_key_value" else config.block_m
    return (config.block_m * config.block_n + held * width) / config.num_warps


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("kernel", ["forward", "grad_query", "grad_key_value"])
def test_calls_that_take_many_registers_get_smaller_tiles(kernel, width, target):
    plain = default_config(kernel, problem(width), target)
    both = {"mask": True, "dropout": True}
    forms = [{"mask": True}, {"dropout": True}, both]
    if kernel == "grad_query":
        forms.append({"query_scale": True, "query_scale_grad": True})
    for form in forms:
        given = problem(width, **form)
        found = default_config(kernel, given, target)
        assert legal_reasons(kernel, found, given, target) == []
        assert values(kernel, found, width) < values(kernel, plain, width), form
        if form != both:
            held = "block_n" if kernel == "grad_key_value" else "block_m"
            if width < 256 or getattr(plain, held) == 128:
                of_a_warp = [getattr(config, held) / config.num_warps for config in (plain, found)]
                assert of_a_warp[1] >= min(of_a_warp[0], 16), "warps that share rows repeat their softmax"


def test_wide_heads_are_refused_where_their_smallest_tiles_do_not_fit():
    refused = {
        (target.name, dtype)
        for target in (*TARGETS, Target.parse("sm_75"))
        for dtype in (HALF, FULL)
        if obstacle(512, 384, dtype, target)
    }
    assert refused == {("sm_75", HALF), *((name, FULL) for name in ("sm_75", "sm_89", "sm_120", "gfx942"))}
    of_latent_attention = {target.name for target in TARGETS if obstacle(576, 512, HALF, target, ("decode",))}
    assert of_latent_attention == {"gfx942"}
    assert obstacle(512, 512, FULL, Target.parse("gfx942")) == (
        "head_dim 512 of torch.float32: forward's tiles need at least 98304 bytes of shared memory, gfx942 has 65536"
    )


def test_page_numbers_come_a_stage_before_their_keys():
    for target in TARGETS:
        plain, paged = (default_config("decode", problem(64, block_table=x), target) for x in (False, True))
        assert paged.num_stages - plain.num_stages == (target.backend == "cuda")
        widest = Problem(576, 512, HALF, block_table=True)  # latent attention
        config = default_config("decode", widest, target)
        assert bool(legal_reasons("decode", config, widest, target)) == (target.backend == "hip")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_tiles_of_batch_invariant_calls_follow_head_dims_and_dtype_alone(target):
    """They are those of a call without options, above width 256 with ranges; over pages without descriptors."""
    masks = ({"right": True}, {"left": True, "key_lengths": True}, {"key_ranges": True}, {"mask": True})
    forms = (*masks, {"sequences": True, "short": True}, {"softcap": True, "aux": True, "key_bias": True})
    for kernel in ("forward", "grad_query", "grad_key_value"):
        for width, dtype in product((64, 128, 256, 512), (HALF, FULL)):
            expected = default_config(kernel, Problem(width, width, dtype, key_ranges=width > 256), target)
            for form in ({}, *forms):
                found = default_config(kernel, Problem(width, width, dtype, invariant=True, **form), target)
                assert found == expected, (kernel, width, dtype, form)
            paged = default_config(kernel, Problem(width, width, dtype, invariant=True, block_table=True), target)
            assert paged == replace(expected, descriptors=False)
