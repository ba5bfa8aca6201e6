"""Configs and problems that `compile_kernel` accepts; tests/compiled reads what kernels compile to."""

import itertools

import pytest
import torch

from tritonattn.backends.triton import KERNELS
from tritonattn.tuning import Problem, Target, TileConfig, compile_kernel, default_config, legal_reasons

NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx90a", "gfx942", "gfx950")


def _variants() -> list[Problem]:
    forms = ("", "right", "left right", "key_lengths", "key_ranges", "mask", "dropout right", "block_table sequences")
    scales = ("", "query_scale", "query_scale key_scale query_scale_grad")
    sizes = ((64, 64), (80, 80), (128, 128), (192, 128), (256, 256))
    return [
        Problem(*size, dtype, **dict.fromkeys(f"{form} {scale}".split(), True))
        for size, dtype, form, scale in itertools.product(sizes, (torch.bfloat16, torch.float32), forms, scales)
    ]


def test_the_legality_predicate():
    problem = Problem(128, 128, torch.bfloat16)
    assert legal_reasons("forward", TileConfig(128, 64, 8, 2), problem, Target("cuda", "80")) == []
    for config in (
        TileConfig(48, 64, 4, 2),
        TileConfig(64, 48, 4, 2),
        TileConfig(8, 64, 4, 2),
        TileConfig(64, 64, 3, 2),
        TileConfig(64, 64, 4, 0),
        TileConfig(256, 64, 8, 2),
        TileConfig(128, 128, 8, 5),
    ):
        assert legal_reasons("forward", config, problem, Target("cuda", "80")), config
        with pytest.raises(ValueError, match="config: expected a legal one"):
            compile_kernel("forward", problem, config, "sm_80")


@pytest.mark.parametrize("target", [*NVIDIA, *AMD])
def test_every_default_is_legal(target):
    parsed = Target.parse(target)
    for kernel, problem in itertools.product(KERNELS, _variants()):
        assert legal_reasons(kernel, default_config(kernel, problem, parsed), problem, parsed) == []
