"""Machine code of the table's cases: no spills, few instructions a logit, and no more work than the tiles ask for."""

import ast
from pathlib import Path

import pytest
import torch

from perf import codegen
from perf.ceilings import KEY_BIAS, KEY_BIAS_OF_TARGET, KEY_SCALE, NON_MMA_PER_LOGIT, QUERY_SCALE, QUERY_SCALE_OF_TARGET
from perf.static.machine_code import flops_per_logit
from tests.support.versions import OLDER_TRITON
from tritonattn.backends import triton as backend
from tritonattn.backends.triton import KERNELS, launch
from tritonattn.tuning import Problem, Target, compile_kernel, default_config

from .facts import facts
from .table import CASES, CEILINGS, QUICK, SCALES, TARGETS, Case, problem_of

pytestmark = pytest.mark.skipif(launch.interpreting, reason="TRITON_INTERPRET=1 leaves nothing to compile")


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_quick_cases(case: Case):
    check(case)


def test_every_kernel_and_target_is_in_the_table():
    assert {case.kernel for case in CASES} == set(KERNELS)
    assert {case.target for case in QUICK} == set(TARGETS)
    assert set(CEILINGS) & set(QUICK)


def test_perf_codegen_shows_the_same_figures():
    case = Case("forward", problem_of(64), "sm_80")
    reading, code = codegen.read(codegen.Case("forward", "sm_80", case.problem)), facts(*case[:3])
    assert reading.non_mma_per_logit == pytest.approx(per_logit(case), abs=1e-4)
    assert (reading.registers, reading.spill_bytes) == (code.registers, code.spill_bytes)


def check(case: Case) -> None:
    """With the ceiling of its kernel, target and head dim: they are of one compiler's code."""
    case.check()
    if case in CEILINGS and not OLDER_TRITON:
        code, dim = facts(*case[:3]), case.problem.head_dim
        assert per_logit(case) <= NON_MMA_PER_LOGIT[case.kernel, case.target, dim], code
        exponentials = per_logit(case, "exp")
        assert exponentials < (1.1 if dim <= 256 else 3.1), f"warps repeat each other's softmax: {code}"
        if case.problem.right and dim == 64:
            check_loops(case)


def per_logit(case: Case, what: str | None = None) -> float:
    """Instructions of all lanes for a logit of the unmasked loop's tile: of one class, or all beside the MMAs."""
    config = default_config(case.kernel, case.problem, Target.parse(case.target))
    loop = facts(*case[:3]).unmasked_loop
    count = loop.instructions[what] if what else loop.other
    return count * 32 * config.num_warps / (loop.tiles * config.block_m * config.block_n)


def check_loops(case: Case) -> None:
    """The FLOPs that the tensor instructions add up to are those of the tile: nothing is unrolled or done twice."""
    config = default_config(case.kernel, case.problem, Target.parse(case.target))
    masked, unmasked = facts(*case[:3]).mma_loops
    work = flops_per_logit(case.kernel, case.problem) * config.block_m * config.block_n
    assert (masked.tiles, unmasked.tiles) == (1, 1)
    assert unmasked.flops == work
    assert masked.flops in (work, work // 2), "masked steps take half of a wide block"


def check_cost_of_scales(kernel: str, target: str) -> None:
    without, query, key, bias = (per_logit(Case(kernel, problem_of(64, scales), target)) for scales in SCALES)
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
    compiled = compile_kernel(kernel, Problem(64, 64, torch.bfloat16, **form), target="sm_80")
    loop = compiled.asm["ttgir"].rsplit("scf.for", 1)[1].split("scf.yield", 1)[0]
    assert loop.count("async_copy_global_to_local") == 2 + form.get("block_table", False)
    assert "tt.load" not in loop


def test_no_loop_writes_to_its_own_variable():
    """Compilers up to triton 3.4 then read the loop's counter wherever the variable was written."""
    for path in Path(backend.__file__).parent.glob("*.py"):
        for loop in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(loop, ast.For):
                names = [node for statement in loop.body for node in ast.walk(statement) if isinstance(node, ast.Name)]
                written = {node.id for node in names if isinstance(node.ctx, ast.Store)}
                assert ast.unparse(loop.target) not in written, f"{path.name}:{loop.lineno}"
