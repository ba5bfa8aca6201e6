"""Targets, legal configs, and default configs; nothing is compiled."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from tritonattn.backends.triton import KERNELS
from tritonattn.tuning import compile_kernel, config
from tritonattn.tuning.architectures import ARCHITECTURES
from tritonattn.tuning.config import TILED_KERNELS, Problem, Target, TileConfig, legal_reasons
from tritonattn.tuning.defaults import default_config, obstacle

HALF, FULL = torch.float16, torch.float32
SM_80, SM_90, SM_100, GFX942 = map(Target.parse, ("sm_80", "sm_90", "sm_100", "gfx942"))


def reasons(tiles: TileConfig, target: Target, kernel: str = "forward", dim: int = 128, dtype=HALF) -> list[str]:
    return legal_reasons(kernel, tiles, Problem(dim, dim, dtype), target)


def test_a_target_is_that_of_the_device_meant(monkeypatch):
    cards = {0: ("Card A", (8, 6), 84), 1: ("Card B", (9, 0), 132)}
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: cards[index][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: cards[index][1])
    properties = {index: SimpleNamespace(multi_processor_count=card[2]) for index, card in cards.items()}
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    config._target_of.cache_clear()
    found = [Target.of(torch.device(name)) for name in ("cuda:0", "cuda:1", "cuda", "cpu")]
    config._target_of.cache_clear()
    second = Target("cuda", "90", "Card B", 132)
    assert found == [Target("cuda", "86", "Card A", 84), second, second, SM_80]


ILLEGAL = (
    (48, 64, 4, 2),
    (64, 48, 4, 2),
    (8, 64, 4, 2),
    (64, 64, 3, 2),
    (64, 64, 4, 0),
    (256, 64, 8, 2),
    (128, 128, 8, 5),
)


def test_illegal_configs_are_not_compiled():
    assert reasons(TileConfig(128, 64, 8, 2), SM_80) == []
    for tiles in (TileConfig(*one) for one in ILLEGAL):
        assert reasons(tiles, SM_80), tiles
        with pytest.raises(ValueError, match="config: expected a legal one"):
            compile_kernel("forward", Problem(128, 128, HALF), tiles, "sm_80")


def test_gradients_of_a_tangent_take_twice_the_tensor_memory_of_gradients():
    """Code that needs more than there is would be a trap."""
    tiles = TileConfig(16, 128, 8, 2)
    assert reasons(tiles, SM_100, "grad_key_value") == []
    found = reasons(tiles, SM_100, "grad_key_value_second")
    assert found == ["tiles need 608 columns of tensor memory, sm_100 has 512"]


def test_options_are_legal_where_the_hardware_has_them():
    waves = TileConfig(64, 32, 4, 2, waves_per_eu=2)
    assert reasons(waves, GFX942) == []
    assert reasons(waves, SM_90) == ["waves_per_eu needs an AMD GPU, sm_90 is none"]
    assert reasons(replace(waves, waves_per_eu=-1), GFX942) == ["waves_per_eu -1 is below 0"]
    divided = TileConfig(64, 32, 4, 2, descriptors=True, warp_specialize=True)
    assert reasons(divided, SM_100) == reasons(divided, Target.parse("sm_103")) == []
    for kernel in ("grad_query", "grad_key_value"):
        assert reasons(divided, SM_100, kernel, dim=64) == []
        assert "warp_specialize needs" in "; ".join(reasons(divided, SM_100, kernel, dim=80))
    for target in (SM_90, Target.parse("sm_120")):
        assert "warp_specialize needs" in "; ".join(reasons(divided, target))
    assert "warp_specialize needs" in "; ".join(reasons(replace(divided, descriptors=False), SM_100))


@pytest.mark.parametrize("kernel", TILED_KERNELS)
def test_two_warps_are_not_legal_where_results_do_not_repeat(kernel):
    pair = TileConfig(16, 32, 2, 1)
    assert reasons(pair, GFX942, kernel) == reasons(replace(pair, num_warps=4), Target.parse("gfx950"), kernel) == []
    assert "num_warps 2 gives other bits in every run" in "; ".join(reasons(pair, Target.parse("gfx950"), kernel))


TARGETS = [Target.parse(name) for name in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")]
FORMS = ("", "right", "left right", "key_lengths", "key_ranges", "mask", "dropout right", "block_table sequences")
SCALES = ("", "query_scale", "query_scale key_scale query_scale_grad")


@pytest.mark.parametrize("target", [*TARGETS, *map(Target.parse, ("sm_86", "gfx90a", "gfx950"))], ids=lambda x: x.name)
def test_every_default_is_legal(target):
    sizes = ((64, 64), (80, 80), (128, 128), (192, 128), (256, 256))
    for size, dtype, form, scale in product(sizes, (HALF, FULL), FORMS, SCALES):
        given = Problem(*size, dtype, **dict.fromkeys(f"{form} {scale}".split(), True))
        for kernel in KERNELS:
            assert legal_reasons(kernel, default_config(kernel, given, target), given, target) == []


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
    summed = [{"query_scale": True, "query_scale_grad": True}] if kernel == "grad_query" else []
    for form in ({"mask": True}, {"dropout": True}, both, *summed):
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
    cases = product((*TARGETS, Target.parse("sm_75")), (HALF, FULL))
    refused = {(target.name, dtype) for target, dtype in cases if obstacle(512, 384, dtype, target)}
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


def test_extras_over_pages_take_half_of_a_wide_step_with_tensor_memory():
    """With a whole one, statistics of rows spill 256 bytes (static, triton 3.9); tests/slow compiles them."""
    pages = {"block_table": True, "sequences": True, "query_scale": True}
    plain = default_config("forward", problem(128, **pages), SM_100)
    for extra in ("aux", "softcap", "key_scale", "key_bias"):
        found = default_config("forward", problem(128, **pages, **{extra: True}), SM_100)
        assert found == replace(plain, block_n=plain.block_n // 2, num_stages=found.num_stages), extra


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


def test_an_unknown_architecture_has_the_least_memory_and_what_its_number_says():
    known = ARCHITECTURES.values()
    for name, descriptors, warp in (
        ("sm_88", False, 32),
        ("sm_110", True, 32),
        ("gfx1201", False, 32),
        ("gfx906", False, 64),
    ):
        one = Target.parse(name).architecture
        assert (one.has_descriptors, one.warp_size) == (descriptors, warp)
        assert one.shared_bytes == min(x.shared_bytes for x in known)
        assert one.l2_bytes <= min(x.l2_bytes for x in known)
        assert (one.family.products == "mfma") == (Target.parse(name).backend == "hip")
