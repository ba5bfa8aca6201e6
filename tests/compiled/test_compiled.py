"""Machine code of the table's cases and of the lesson's kernels: no spills, few instructions per logit, wide loads."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from perf.models import codegen
from perf.models.ceilings import (
    DIRECT_LOADS,
    KEY_BIAS,
    KEY_BIAS_OF_TARGET,
    KEY_SCALE,
    NON_MMA_PER_LOGIT,
    QUERY_SCALE,
    QUERY_SCALE_OF_TARGET,
)
from perf.models.static.machine_code import flops_per_logit, read_machine_code
from tests.support.tiles import quick_config
from tests.support.versions import OLDER_TRITON
from tritonattn.backends import triton as backend
from tritonattn.backends.triton import KERNELS, launch
from tritonattn.tuning import Problem, Target, cache_dir, compile_kernel, default_config
from tritonattn.tuning.lookup import usable_table
from tritonattn.tuning.table import Key

from .facts import facts
from .table import CASES, CEILINGS, PAIR_CEILINGS, QUICK, SCALES, TARGETS, Case, problem_of

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
        assert exponentials < (1.1 if dim <= 256 else 2.3), f"warps repeat each other's softmax: {code}"
        if case.problem.right and dim == 64:
            check_loops(case)
    if case in PAIR_CEILINGS and not OLDER_TRITON:
        assert per_logit(case) <= PAIR_CEILINGS[case], facts(*case[:3])


def per_logit(case: Case, what: str | None = None) -> float:
    """Instructions of all lanes for a logit of the unmasked loop's tile: of one class, or all but the MMAs."""
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


@pytest.mark.skipif(OLDER_TRITON, reason="the tables are of another compiler's code")
def test_a_shipped_config_of_gfx950_copies_from_memory_to_lds():
    check_direct_loads("forward", 128)


def check_direct_loads(kernel: str, head_dim: int) -> None:
    """Two stages of keys and values, of which no thread holds one in registers; and no spills."""
    key, target = Key(kernel, head_dim, "query", "long"), Target.parse("gfx950")
    config = usable_table(cache_dir.shipped_tables() / "mi350x.json", target).entries[key].config
    code = facts(kernel, key.problem, target.name, config)
    assert (config.num_warps, config.num_stages, code.spill_bytes) == (4, 2, 0)
    assert code.direct_loads >= DIRECT_LOADS[kernel, head_dim]


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


def test_no_loop_writes_to_its_variable():
    """Compilers up to triton 3.4 then read the loop's counter wherever the variable was written."""
    for path in Path(backend.__file__).parent.glob("*.py"):
        for loop in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(loop, ast.For):
                names = [node for statement in loop.body for node in ast.walk(statement) if isinstance(node, ast.Name)]
                written = {node.id for node in names if isinstance(node.ctx, ast.Store)}
                assert ast.unparse(loop.target) not in written, f"{path.name}:{loop.lineno}"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "products"), [("forward", 2), ("grad_query", 3), ("grad_key_value", 4)])
def test_kernels_of_the_lesson_compile(name, products, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the file asks for the interpreter where there is no GPU
    lesson = importlib.import_module("docs.examples.kernel")
    kernel, sizes = getattr(lesson, f"{name}_kernel"), {"D": 128, **lesson.TILES}
    tensors = (f"{tensor}_ptr" for tensor in ("q", "k", "v", "out", "do", "dq", "dk", "dv"))
    types = dict.fromkeys(tensors, "*bf16") | dict.fromkeys(sizes, "constexpr") | {"S": "i32"}
    signature = {argument: types.get(argument, "*fp32") for argument in kernel.arg_names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, type in enumerate(signature.values()) if "*" in type}
    source = ASTSource(kernel, signature, sizes, aligned)
    options = {"num_warps": lesson.LAUNCH["num_warps"], "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.asm["ttgir"].count("warp_group_dot ") == products
    assert read_machine_code(compiled).spill_bytes == 0


HALF, BFLOAT, SINGLE = torch.float16, torch.bfloat16, torch.float32
PAGES = {"sequences": True, "block_table": True}
LOADS = [
    ("grad_query", "sm_90", 40, BFLOAT, {}),
    ("key_statistics_grad", "sm_80", 136, BFLOAT, {}),
    ("append_keys", "sm_90", 72, BFLOAT, {}),
    ("forward", "sm_80", 40, HALF, PAGES),
]
SLOW = [
    ("grad_key_value", "sm_90", 136, BFLOAT, {}),
    ("decode", "sm_90", 40, SINGLE, {}),
]


@pytest.mark.parametrize("case", LOADS, ids=lambda case: case[0])
def test_tiles_load_16_bytes_at_a_time(case):
    check_loads(*case)


def check_loads(kernel: str, target: str, dim: int, dtype: torch.dtype, form: dict[str, bool]) -> None:
    """Narrow loads are as many as at the next multiple of 16, where Triton itself finds the alignment."""
    wider = -(-dim // 16) * 16
    assert narrow_loads(kernel, target, dim, dtype, form) == narrow_loads(kernel, target, wider, dtype, form)


def narrow_loads(kernel: str, target: str, dim: int, dtype: torch.dtype, form: dict[str, bool]) -> int:
    """Loads of fewer than 16 bytes in a kernel's code: those of vectors over rows and keys.

    Row terms are read without what rounding took from an output: rows of 8 bits a number are multiples of 8 bytes only.
    """
    problem = Problem(dim, dim, dtype, right=True, rounding=dtype == BFLOAT and kernel != "row_terms", **form)
    code = ptx(kernel, problem, target)
    loads = re.findall(r"ld\.global[\w.:]*", code)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global [^,]*,[^,]*, (0x[0-9a-f]+|\d+)", code)
    assert loads or copies
    narrow = [load for load in loads if not load.endswith((".v4.b32", ".v2.b64", ".v8.b32"))]
    return len(narrow) + sum(int(size, 0) < 16 for size in copies)


def ptx(kernel: str, problem: Problem, target: str) -> str:
    return compile_kernel(kernel, problem, quick_config(kernel, problem, Target.parse(target)), target).asm["ptx"]


def test_rows_of_an_odd_stride_load_number_by_number():
    """So that the count above can fail."""
    code = ptx("forward", Problem(40, 40, BFLOAT, right=True, aligned=False), "sm_80")
    assert len(re.findall(r"ld\.global\S*b16 ", code)) > 64
