"""The machine code of the default configs stays inside perf/ceilings.py and spills in no loop; nothing here runs it."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

triton = pytest.importorskip("triton")
from perf.ceilings import KEY_SCALE, NON_MMA_PER_LOGIT, QUERY_SCALE, QUERY_SCALE_OF_TARGET
from perf.codegen import Case, Reading, read
from tests.support.slow import marked
from tests.support.versions import OLDER_TRITON
from tritonattn.backends.triton import launch
from tritonattn.tuner.machine_code import flops_per_logit, read_machine_code
from tritonattn.tuning import Problem, Target, compile_kernel, default_config
from tritonattn.tuning.config import TILED_KERNELS, padded_dim

NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx90a", "gfx942", "gfx950")
SCALES = {"none": {}, "q": {"query_scale": True}, "qk": {"query_scale": True, "key_scale": True}}

pytestmark = [
    pytest.mark.skipif(launch.interpreting, reason="TRITON_INTERPRET=1 leaves nothing to compile"),
    pytest.mark.skipif(OLDER_TRITON, reason="the ceilings are those of another compiler's code"),
]


@functools.cache
def reading(kernel: str, target: str, head_dim: int, scales: str = "q", causal: bool = True) -> Reading:
    """Read a bf16 kernel as `python -m perf codegen` does."""
    problem = Problem(head_dim, head_dim, torch.bfloat16, right=causal, **SCALES[scales])
    return read(Case(kernel, target, problem))


@pytest.mark.parametrize(("kernel", "target", "head_dim"), NON_MMA_PER_LOGIT)
def test_other_instructions_per_logit(kernel, target, head_dim):
    found = reading(kernel, target, head_dim)
    assert found.non_mma_per_logit <= NON_MMA_PER_LOGIT[kernel, target, head_dim], found
    assert found.spill_bytes == 0, found
    assert found.instructions["exp"] < 1.1, f"warps repeat each other's softmax: {found}"


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "target", "head_dim"), NON_MMA_PER_LOGIT)
def test_other_instructions_per_logit_without_a_mask(kernel, target, head_dim):
    found = reading(kernel, target, head_dim, causal=False)
    assert found.non_mma_per_logit <= NON_MMA_PER_LOGIT[kernel, target, head_dim], found


@pytest.mark.parametrize(
    ("kernel", "target", "head_dim"),
    marked(NON_MMA_PER_LOGIT, lambda kernel, target, head_dim: (target, head_dim) == ("sm_90", 64)),
)
def test_what_scales_cost(kernel, target, head_dim):
    without, query, key = (reading(kernel, target, head_dim, scales) for scales in SCALES)
    allowed = QUERY_SCALE_OF_TARGET.get((kernel, target), QUERY_SCALE[kernel])
    assert query.non_mma_per_logit - without.non_mma_per_logit <= allowed, (without, query)
    assert key.non_mma_per_logit - query.non_mma_per_logit <= KEY_SCALE[kernel], (query, key)


@pytest.mark.parametrize(
    ("kernel", "target", "head_dim"),
    marked(NON_MMA_PER_LOGIT, lambda kernel, target, head_dim: (target, head_dim) == ("sm_80", 64)),
)
def test_counts_do_not_depend_on_fp_fusion(kernel, target, head_dim, monkeypatch):
    """Every multiply-add is written as one, whatever Triton's default."""
    compile_any = triton.compile
    problem = Problem(head_dim, head_dim, torch.bfloat16, right=True, query_scale=True)

    def count(fused: bool) -> dict[str, int]:
        monkeypatch.setattr(
            triton,
            "compile",
            lambda source, target, options: compile_any(source, target, options | {"enable_fp_fusion": fused}),
        )
        return read_machine_code(compile_kernel(kernel, problem, target=target)).unmasked_loop.instructions

    assert count(True)["fp32"] == count(False)["fp32"]


def sizes() -> list[tuple]:
    """Kernel, target, head_dim and scales of what must not spill; padded heads only with all scales."""
    targets = {64: NVIDIA + AMD, 80: NVIDIA + AMD, 96: NVIDIA + AMD, 128: NVIDIA + AMD}
    wide = {192: ("sm_80", "sm_90", "sm_100", *AMD), 256: ("sm_80", "sm_90", "sm_100", *AMD)}
    return [
        (kernel, target, head_dim, scales)
        for kernel, (head_dim, some), scales in itertools.product(TILED_KERNELS, (targets | wide).items(), SCALES)
        for target in some
        if scales == "qk" or head_dim == padded_dim(head_dim)
    ]


def is_quick(kernel: str, target: str, head_dim: int, scales: str) -> bool:
    quick = {("sm_120", 128), ("sm_86", 128), ("sm_89", 80), ("gfx90a", 64), ("gfx942", 64), ("gfx950", 128)}
    return scales == "qk" and (target, head_dim) in quick


@pytest.mark.parametrize(("kernel", "target", "head_dim", "scales"), marked(sizes(), is_quick))
def test_no_loop_spills(kernel, target, head_dim, scales):
    found = reading(kernel, target, head_dim, scales)
    assert found.spill_bytes == 0, found


@pytest.mark.parametrize(("kernel", "target"), list(itertools.product(QUERY_SCALE, ("sm_80", "sm_90", "sm_100"))))
def test_work_of_the_loops(kernel, target):
    """The FLOPs that the tensor instructions add up to are those of the tile: nothing is unrolled or done twice."""
    problem = Problem(64, 64, torch.bfloat16, right=True, query_scale=True)
    config = default_config(kernel, problem, Target.parse(target))
    loops = read_machine_code(compile_kernel(kernel, problem, config, target)).mma_loops
    work = flops_per_logit(kernel, problem) * config.block_m * config.block_n
    masked, unmasked = loops
    assert (masked.tiles, unmasked.tiles) == (1, 1)
    assert unmasked.flops == work
    assert masked.flops in (work, work // 2), "masked steps take half of a wide block"
