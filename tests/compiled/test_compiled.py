"""Machine code of the table's cases: no spills, few instructions a logit, and no more work than the tiles ask for."""

import ast
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
from perf import codegen
from perf.ceilings import (
    KEY_BIAS,
    KEY_BIAS_OF_TARGET,
    KEY_SCALE,
    NON_MMA_PER_LOGIT,
    QUERY_SCALE,
    QUERY_SCALE_OF_TARGET,
)
from tests.support.versions import OLDER_TRITON
from tritonattn import kernels
from tritonattn.backends.triton import launch
from tritonattn.tuner.machine_code import MachineCode, flops_per_logit
from tritonattn.tuning import Problem, Target, compile_kernel, default_config

from .facts import facts
from .table import CASES, QUICK, SCALES, TARGETS, Case

pytestmark = pytest.mark.skipif(launch.interpreting, reason="TRITON_INTERPRET=1 leaves nothing to compile")
LOOPS = [(kernel, target) for kernel, target, head_dim in NON_MMA_PER_LOGIT if head_dim == 64]
of_this_compiler = pytest.mark.skipif(OLDER_TRITON, reason="the ceilings are those of another compiler's code")


def problem_of(head_dim: int, scales: str = "q", causal: bool = True) -> Problem:
    return Problem(head_dim, head_dim, torch.bfloat16, right=causal, **SCALES[scales])


def code_of(kernel: str, target: str, head_dim: int, scales: str = "q", causal: bool = True) -> MachineCode:
    return facts(kernel, problem_of(head_dim, scales, causal), target)


def per_logit(kernel: str, target: str, head_dim: int, code: MachineCode) -> float:
    """Instructions beside the MMAs, of all lanes, for a logit of the unmasked loop's tile."""
    config = default_config(kernel, problem_of(head_dim), Target.parse(target))
    loop = code.unmasked_loop
    return loop.other * 32 * config.num_warps / (loop.tiles * config.block_m * config.block_n)


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_quick_cases(case: Case):
    case.check()


def test_every_kernel_and_target_is_in_the_table():
    assert {case.kernel for case in CASES} == set(kernels.KERNELS)
    assert {case.target for case in QUICK} == set(TARGETS)


@of_this_compiler
@pytest.mark.parametrize(("kernel", "target"), LOOPS[::4])
def test_work_of_the_loops(kernel, target):
    check_loops(kernel, target)


def test_perf_codegen_shows_the_same_figures():
    case = codegen.Case("forward", "sm_80", problem_of(64))
    reading, code = codegen.read(case), code_of("forward", "sm_80", 64)
    assert reading.non_mma_per_logit == pytest.approx(per_logit("forward", "sm_80", 64, code), abs=1e-4)
    assert (reading.registers, reading.spill_bytes) == (code.registers, code.spill_bytes)


def check_ceiling(kernel: str, target: str, head_dim: int, code: MachineCode) -> None:
    assert per_logit(kernel, target, head_dim, code) <= NON_MMA_PER_LOGIT[kernel, target, head_dim], code
    config, loop = default_config(kernel, problem_of(head_dim), Target.parse(target)), code.unmasked_loop
    exponentials = loop.instructions["exp"] * 32 * config.num_warps / (loop.tiles * config.block_m * config.block_n)
    assert exponentials < (1.1 if head_dim <= 256 else 3.1), f"warps repeat each other's softmax: {code}"
    assert code.spill_bytes == 0, code


def check_loops(kernel: str, target: str) -> None:
    """The FLOPs that the tensor instructions add up to are those of the tile: nothing is unrolled or done twice."""
    config, code = default_config(kernel, problem_of(64), Target.parse(target)), code_of(kernel, target, 64)
    check_ceiling(kernel, target, 64, code)
    masked, unmasked = code.mma_loops
    work = flops_per_logit(kernel, problem_of(64)) * config.block_m * config.block_n
    assert (masked.tiles, unmasked.tiles) == (1, 1)
    assert unmasked.flops == work
    assert masked.flops in (work, work // 2), "masked steps take half of a wide block"


@of_this_compiler
def test_scales_cost_few_instructions():
    check_cost_of_scales("forward", "sm_80", 64)


def check_cost_of_scales(kernel: str, target: str, head_dim: int) -> None:
    without, query, key, bias = (
        per_logit(kernel, target, head_dim, code_of(kernel, target, head_dim, scales)) for scales in SCALES
    )
    assert query - without <= QUERY_SCALE_OF_TARGET.get((kernel, target), QUERY_SCALE[kernel])
    assert key - query <= KEY_SCALE[kernel]
    assert bias - query <= KEY_BIAS_OF_TARGET.get((kernel, target), KEY_BIAS[kernel])


@pytest.mark.parametrize("kernel", ["row_bounds", "keys_seen", "argmax_of_ranges"])
def test_passes_over_ranges_keep_to_amds_scalar_registers(kernel):
    """They hold the bounds of a wave's rows, which its threads have in common."""
    form = dict.fromkeys(("left", "right", "key_lengths", "key_ranges"), True)
    code = compile_kernel(kernel, Problem(1, 1, torch.float32, **form), target="gfx942").asm["amdgcn"]
    assert ".sgpr_spill_count: 0\n" in code


@pytest.mark.parametrize(
    ("kernel", "form"),
    [
        ("decode", {}),
        ("decode", {"block_table": True}),
        ("forward", {"block_table": True, "sequences": True, "right": True}),
    ],
    ids=["decode", "decode over pages", "forward over pages"],
)
def test_keys_and_values_of_a_cache_come_asynchronously(kernel, form):
    """Page numbers are fetched a stage before the keys that they point to, and neither is waited for at once."""
    compiled = compile_kernel(kernel, Problem(128, 128, torch.bfloat16, **form), target="sm_80")
    loop = compiled.asm["ttgir"].rsplit("scf.for", 1)[1].split("scf.yield", 1)[0]
    assert loop.count("async_copy_global_to_local") == 2 + form.get("block_table", False)
    assert "tt.load" not in loop


def test_no_loop_writes_to_its_own_variable():
    """Compilers up to triton 3.4 then read the loop's counter wherever the variable was written."""
    for path in Path(kernels.__file__).parent.glob("*.py"):
        for loop in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(loop, ast.For):
                names = [node for statement in loop.body for node in ast.walk(statement) if isinstance(node, ast.Name)]
                written = {node.id for node in names if isinstance(node.ctx, ast.Store)}
                assert ast.unparse(loop.target) not in written, f"{path.name}:{loop.lineno}"
