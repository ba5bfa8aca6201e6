"""The rest of the table of compiled cases, and a sample of the shipped configs."""

import pytest
import torch

pytest.importorskip("triton")
from perf.models.ceilings import EIGHT_BIT_PAGES
from perf.models.static import ranking
from perf.models.static.gate import examine
from perf.models.static.machine_code import read_machine_code
from perf.models.static.ranking import ranked_table
from tests.autotune.test_gate import DIVIDED
from tests.compiled import test_hopper as hopper
from tests.compiled.table import CASES, KINDS, QUICK, over_pages, problem_of
from tests.compiled.test_compiled import (
    SLOW,
    check,
    check_cost_of_scales,
    check_direct_loads,
    check_loads,
    per_logit,
    pytestmark,
)
from tests.perf.test_static import ENTRIES, check_shipped_entry
from tests.support.versions import OLDER_TRITON
from tritonattn.autotune.gate import Compiler
from tritonattn.backends.triton import KERNELS, compile, launch
from tritonattn.tuning.config import Problem, Target
from tritonattn.tuning.gpus import GPUS
from tritonattn.tuning.lookup import config_for
from tritonattn.tuning.table import HEAD_DIMS, Key, keys

__all__ = ["pytestmark"]
ODD = [(gpu, key) for gpu in GPUS for key in keys(head_dims=tuple(dim for dim in HEAD_DIMS if dim % 16))]
of_this_compiler = pytest.mark.skipif(OLDER_TRITON, reason="ceilings and tables are of another compiler's code")


@of_this_compiler
@pytest.mark.parametrize("case", [case for case in CASES if case not in QUICK], ids=str)
def test_cases(case):
    check(case)


@pytest.mark.parametrize("target", KINDS[::2])
def test_row_terms_of_a_tangent(target):
    """The tangent kernel's other launch, in the same config, whose products are others."""
    problem, of = Problem(256, 256, torch.bfloat16, query_scale=True, key_scale=True, right=True), Target.parse(target)
    with launch.recording(of) as launches:
        compile._second(problem)
    found = next(one for one in launches if one.kernel is KERNELS["tangent"])
    code = read_machine_code(compile.compile_launch(found, of))
    assert code.spill_bytes == 0
    assert code.shared_bytes <= of.architecture.shared_bytes


@of_this_compiler
@pytest.mark.parametrize(
    ("kernel", "target"),
    [("forward", "sm_80"), ("grad_query", "sm_90"), ("grad_key_value", "sm_100")],
)
def test_scales_cost_few_instructions(kernel, target):
    check_cost_of_scales(kernel, target)


@of_this_compiler
@pytest.mark.parametrize(("kernel", "target"), EIGHT_BIT_PAGES)
def test_pages_of_8_bits_beside_those_of_16(kernel, target):
    for eight_bit, ceiling in enumerate(EIGHT_BIT_PAGES[kernel, target]):
        assert per_logit(over_pages(kernel, target, eight_bit == 1)) <= ceiling


@of_this_compiler
def test_unmasked_loop_of_128():
    hopper.check(128, causal=False)


@of_this_compiler
@pytest.mark.parametrize("form", ["aux", "softcap", "key_bias"])
def test_forms_of_gluon_that_hold_more_have_two_consumers(form):
    hopper.check_form(form)


@pytest.mark.parametrize("case", SLOW, ids=lambda case: f"{case[0]}-{case[1]}")
def test_tiles_load_16_bytes_at_a_time(case):
    check_loads(*case)


@of_this_compiler
def test_a_divided_loop_without_enough_tensor_memory_is_a_trap():
    reasons = examine("grad_query", problem_of(64), DIVIDED, Target.parse("sm_100")).reasons
    assert reasons[0] == "takes 640 columns of tensor memory, there are 512"
    assert reasons[-1] == "has 4 registers: its code is a trap"


@of_this_compiler
def test_a_shipped_gradient_of_gfx950_copies_from_memory_to_lds():
    check_direct_loads("grad_query", 128)


@pytest.mark.parametrize("position", range(47, len(ENTRIES), 520))
def test_shipped_entries_pass_the_gate(position):
    check_shipped_entry(position)


@of_this_compiler
@pytest.mark.parametrize("position", range(99, len(ODD), 297))
def test_entries_of_a_padded_width_pass_the_gate(position):
    gpu, key = ODD[position]
    config = config_for(key.kernel, key.problem, gpu.target._replace(card=" ".join(gpu.words)))
    assert examine(key.kernel, key.problem, config, gpu.target).reasons == ()


def test_a_static_table_is_the_same_twice(monkeypatch):
    few = ranking.static_candidates
    monkeypatch.setattr(ranking, "static_candidates", lambda *of: few(*of)[:3])
    wanted = [Key("forward", 64, "query", lengths) for lengths in ("short", "long")]
    gpu = next(gpu for gpu in GPUS if gpu.name == "a100")
    with Compiler(gpu.target, 1, examine) as compiler:
        first, second = (ranked_table(gpu, compiler, wanted) for _ in range(2))
    assert first.text() == second.text()
    assert list(first.entries) == wanted
    for entry in first.entries.values():
        assert entry.source == "static"
        assert entry.details["spill_bytes"] == 0
        assert entry.details["registers"] <= 255
