"""The rest of the table of compiled cases, and of the shipped configs."""

import pytest

triton = pytest.importorskip("triton")
from perf.ceilings import NON_MMA_PER_LOGIT
from tests.compiled.table import CASES, QUICK
from tests.compiled.test_compiled import (
    LOOPS,
    check_ceiling,
    check_cost_of_scales,
    check_loops,
    code_of,
    of_this_compiler,
    pytestmark,
)
from tests.compiled.test_loads import CASES as CASES_OF_LOADS
from tests.compiled.test_loads import QUICK as QUICK_LOADS
from tests.compiled.test_loads import check_loads
from tests.support.pairs import in_turn
from tests.support.versions import OLDER_TRITON
from tests.tuner.test_static import ENTRIES, check_shipped_entry
from tritonattn.tuner.gate import examine
from tritonattn.tuner.static import Compiler, keys, static_table
from tritonattn.tuning.gpus import GPUS
from tritonattn.tuning.lookup import config_for
from tritonattn.tuning.table import HEAD_DIMS, Key

__all__ = ["pytestmark"]
ODD = [(gpu, key) for gpu in GPUS for key in keys(head_dims=tuple(dim for dim in HEAD_DIMS if dim % 16))]


@pytest.mark.parametrize("case", [case for case in CASES if case not in QUICK], ids=str)
def test_cases(case):
    case.check()


@of_this_compiler
@in_turn(case=NON_MMA_PER_LOGIT, causal=[False, True])
def test_other_instructions_per_logit(case, causal):
    kernel, target, head_dim = case
    check_ceiling(kernel, target, head_dim, code_of(kernel, target, head_dim, causal=causal))


@of_this_compiler
@pytest.mark.parametrize(("kernel", "target"), [loop for loop in LOOPS if loop not in LOOPS[::4]])
def test_work_of_the_loops(kernel, target):
    check_loops(kernel, target)


@of_this_compiler
@pytest.mark.parametrize(("kernel", "target"), LOOPS[1::2])
def test_scales_cost_few_instructions(kernel, target):
    check_cost_of_scales(kernel, target, 64)


@pytest.mark.parametrize("position", range(0, len(ENTRIES), 47))
def test_shipped_entries_pass_the_gate(position):
    check_shipped_entry(position)


@pytest.mark.skipif(OLDER_TRITON, reason="the tables are of another compiler's code")
@pytest.mark.parametrize("position", range(0, len(ODD), 99))
def test_entries_of_a_padded_width_pass_the_gate(position):
    gpu, key = ODD[position]
    config = config_for(key.kernel, key.problem, gpu.target._replace(card=" ".join(gpu.words)))
    assert examine(key.kernel, key.problem, config, gpu.target).reasons == ()


def test_a_static_table_is_the_same_twice():
    wanted = [Key("forward", 64, "query", lengths) for lengths in ("short", "long")]
    gpu = next(gpu for gpu in GPUS if gpu.name == "a100")
    with Compiler(gpu.target, workers=1) as compiler:
        first = static_table(gpu, compiler, wanted)
        second = static_table(gpu, compiler, wanted)
    assert first.text() == second.text()
    assert list(first.entries) == wanted
    for entry in first.entries.values():
        assert entry.source == "static"
        assert entry.details["spill_bytes"] == 0
        assert entry.details["registers"] <= 255


@pytest.mark.parametrize(
    ("kernel", "target", "dim", "dtype"), [case for case in CASES_OF_LOADS if case not in QUICK_LOADS]
)
def test_tiles_load_16_bytes_at_a_time(kernel, target, dim, dtype):
    check_loads(kernel, target, dim, dtype)
