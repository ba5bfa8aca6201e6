"""Every kernel compiles for every target without a GPU, and no loop of a default config spills registers."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

triton = pytest.importorskip("triton")

from tests.support.slow import marked
from tests.support.versions import OLDER_TRITON
from tritonattn.backends.triton import launch
from tritonattn.kernels import KERNELS
from tritonattn.tuner.machine_code import read_machine_code
from tritonattn.tuning import Problem, Target, TileConfig, compile_kernel, default_config, legal_reasons
from tritonattn.tuning.config import STREAMING_KERNELS, TILED_KERNELS, shared_limit

NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx90a", "gfx942", "gfx950")
SCALED = {"query_scale": True, "key_scale": True}

pytestmark = [
    pytest.mark.skipif(launch.interpreting, reason="TRITON_INTERPRET=1 leaves nothing to compile"),
]


def _check(kernel: str, problem: Problem, target: str, spill_bytes: int = 0) -> None:
    code = read_machine_code(compile_kernel(kernel, problem, target=target))
    assert code.spill_bytes <= spill_bytes, f"{kernel} {problem} {target}: {code}"
    assert code.shared_bytes <= shared_limit(Target.parse(target)), f"{kernel} {problem} {target}: {code}"
    if kernel in TILED_KERNELS and target in NVIDIA and problem.dtype != torch.float32:
        assert code.mma_loops, f"{kernel} {problem} {target}: expected a loop with tensor instructions, got {code}"


def _slow_but(*quick: str, of: tuple[str, ...]) -> list:
    """All of these, slow but for the quick ones."""
    return [pytest.param(one, marks=() if one in quick else pytest.mark.slow) for one in of]


def _third(*axes, quick: Callable[..., bool]) -> list:
    """The quick combinations, and of all others a third as slow ones: those of any axes but one meet each in turn."""
    cases = []
    for numbered in itertools.product(*map(enumerate, axes)):
        places, case = zip(*numbered, strict=True)
        if quick(*case) or sum(places) % 3 == 0:
            cases.append(case)
    return marked(cases, quick)


# What is slow here is quick in test_codegen: of sm_80, 90 and 100 for its ceilings, of the others with more scales.
@pytest.mark.parametrize("target", _slow_but("sm_80", "sm_90", "sm_100", of=NVIDIA))
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kernel", _slow_but("decode", of=TILED_KERNELS))
def test_default_configs_do_not_spill(kernel, head_dim, target):
    _check(kernel, Problem(head_dim, head_dim, torch.bfloat16, right=True, query_scale=True), target)


@pytest.mark.parametrize("target", _slow_but("gfx950", of=AMD))
@pytest.mark.parametrize("kernel", TILED_KERNELS)
def test_default_configs_do_not_spill_on_amd(kernel, target):
    _check(kernel, Problem(64, 64, torch.bfloat16, right=True, **SCALED), target)


@pytest.mark.parametrize("target", _slow_but("gfx942", of=AMD))
@pytest.mark.parametrize("kernel", ["row_bounds", "keys_seen", "argmax_of_ranges"])
def test_passes_over_ranges_keep_to_amds_scalar_registers(kernel, target):
    """Which hold what the threads of a wave have in common: here the bounds of its rows."""
    form = dict.fromkeys(("left", "right", "key_lengths", "key_ranges"), True)
    code = compile_kernel(kernel, Problem(1, 1, torch.float32, **form), target=target).asm["amdgcn"]
    assert ".sgpr_spill_count: 0\n" in code


@pytest.mark.parametrize("target", _slow_but("sm_90", "sm_100", "gfx942", of=(*NVIDIA, *AMD)))
@pytest.mark.parametrize("kernel", STREAMING_KERNELS)
def test_streaming_kernels(kernel, target):
    masks = {"right": True, "left": True, "key_lengths": True, "key_ranges": True}
    _check(kernel, Problem(64, 64, torch.bfloat16, **masks, **SCALED), target)


FORMS = {
    "causal": {"right": True, "query_scale": True},
    "key scale": {"right": True, **SCALED},
    "query scale grad": {"right": True, **SCALED, "query_scale_grad": True},
    "mask": {"mask": True, **SCALED, "query_scale_grad": True},
    "dropout": {"dropout": True, "right": True, **SCALED, "query_scale_grad": True},
}


@pytest.mark.parametrize(
    ("kernel", "head_dim", "form", "target"),
    _third(
        TILED_KERNELS,
        (64, 128, 256),
        FORMS,
        (*NVIDIA, *AMD),
        quick=lambda kernel, head_dim, form, target: (head_dim, form, target) == (256, "query scale grad", "sm_90"),
    ),
)
def test_float32_does_not_spill(kernel, head_dim, form, target):
    """On sm_120 ptxas keeps to 80 registers, one too few."""
    allowed = 4 if target == "sm_120" else 0
    _check(kernel, Problem(head_dim, head_dim, torch.float32, **FORMS[form]), target, allowed)


@pytest.mark.skipif(OLDER_TRITON, reason="3.8 spills")
@pytest.mark.parametrize(
    ("kernel", "head_dim", "masks", "target"),
    _third(
        ("forward", "grad_query", "grad_key_value"),
        (64, 128),
        ("right", "mask", "right left key_lengths"),
        NVIDIA,
        quick=lambda kernel, head_dim, masks, target: (head_dim, target) == (128, "sm_90"),
    ),
)
def test_dropout_does_not_spill(kernel, head_dim, masks, target):
    """On sm_120 three registers too few for a dense mask besides, at head dim 64."""
    form = dict.fromkeys(masks.split(), True)
    problem = Problem(head_dim, head_dim, torch.bfloat16, dropout=True, query_scale=True, **form)
    _check(kernel, problem, target, spill_bytes=12 if target == "sm_120" and problem.mask else 0)


def _variants() -> list[Problem]:
    parts = ((), ("right",), ("left", "right"), ("key_lengths",), ("key_ranges",), ("mask",))
    visible = [dict.fromkeys(names, True) for names in parts]
    scales = ({}, {"query_scale": True}, {**SCALED, "query_scale_grad": True})
    sizes = ((64, 64), (80, 80), (128, 128), (192, 128), (256, 256))
    return [
        Problem(*size, dtype, **see, **scale)
        for size, dtype, see, scale in itertools.product(sizes, (torch.float16, torch.bfloat16), visible, scales)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("target", [*NVIDIA, *AMD])
@pytest.mark.parametrize("kernel", TILED_KERNELS)
def test_sampled_variants_compile(kernel, target):
    """A spread of masks, scales and sizes; shared memory must fit."""
    variants = _variants()
    stride = 37 if target in NVIDIA else 89
    for problem in variants[(hash_of(kernel + target) % stride) :: stride]:
        compiled = compile_kernel(kernel, problem, target=target)
        assert compiled.metadata.shared <= shared_limit(Target.parse(target)), problem


def hash_of(text: str) -> int:
    """The same in every process."""
    return sum(ord(letter) * (position + 1) for position, letter in enumerate(text))


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


def test_unknown_names():
    problem = Problem(64, 64, torch.bfloat16)
    with pytest.raises(ValueError, match=r"kernel: expected one of forward, .*, got 'backward'"):
        compile_kernel("backward", problem)
    with pytest.raises(ValueError, match=r"target: expected sm_<number from 70> or gfx<name>, got 'H100'"):
        compile_kernel("forward", problem, target="H100")


@pytest.mark.parametrize(("dim", "dtype"), [(512, torch.float16), (0, torch.float16), (64, torch.float64)])
def test_problems_that_kernels_do_not_solve(dim, dtype):
    with pytest.raises(ValueError, match=rf"problem: expected head dims from 1 to 256 .*got \({dim}, 64\) and {dtype}"):
        compile_kernel("forward", Problem(dim, 64, dtype))
