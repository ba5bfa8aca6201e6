"""The timed search on tiny calls: its workloads launch the kernel meant, and wrong results are never taken."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tritonattn.autotune.workload import Workload
from tritonattn.backends.triton import launch
from tritonattn.tuning.calls import Call, Size, record
from tritonattn.tuning.config import SECOND_KERNELS, Problem, TileConfig
from tritonattn.tuning.table import SCALES, Exact, Key

BEST = TileConfig(16, 16, 4, 1)


def keys() -> list[Key]:
    """Every kernel, without scales, and with all of them and their gradients."""
    return [Key(kernel, 64, scales, "short") for kernel, forms in SCALES.items() for scales in (forms[0], forms[-1])]


def half(key: Key) -> Problem:
    return replace(key.problem, dtype=torch.float16)


# Problems of recorded calls: between them every option, dims that differ, packed sequences and pages.
TERMS = "query_scale key_scale key_bias softcap sinks"
OF_CALLS = {
    "ranges": f"left right key_lengths key_ranges {TERMS}",
    "mask": "mask dropout aux grouped unaligned",
    "packed": "sequences right left grouped key_bias rounding",
    "pages": "sequences right block_table grouped aux key_scale",
    "pairs": "right grouped softcap bias relative_bias key_bias",
    "pairs behind": "left softcap bias_after_softcap relative_bias query_scale",
    "wide": "fp32_grad_q fp32_grad_k is_part query_scale query_scale_grad",
    "derivatives": f"right key_lengths {TERMS} aux rounding",
}
OF_DECODE = {  # and packed rows
    f"left aux {TERMS}": 16,
    "sequences grouped block_table": 32,
    "key_ranges grouped unaligned": 16,
    "grouped block_table relative_bias bias": 16,
}


def problem_of(options: str, **others: Any) -> Problem:
    names = dict.fromkeys(options.split(), True)
    aligned = not names.pop("unaligned", False)
    return Problem(32, 16, torch.float16, short=True, aligned=aligned, **names, **others)


def recorded() -> Iterator[Call]:
    """Calls of each kernel that has them: a backward over pages has none, a forward no wide gradients."""
    for name, options in OF_CALLS.items():
        kernels = {
            "pages": ("forward",),
            "mask": ("forward", "grad_key_value"),
            "wide": ("grad_query", "grad_key_value"),
            "derivatives": SECOND_KERNELS,
        }
        for kernel in kernels.get(name, ("forward", "grad_query", "grad_key_value")):
            yield Call(Exact(kernel, problem_of(options)), size_of(20, 40, problem_of(options)))
    for options, rows in OF_DECODE.items():
        problem = problem_of(options, packed_rows=rows)
        size = replace(size_of(9 if rows > 16 else 1, 48, problem), q_total=0, k_total=0)
        yield Call(Exact("decode", problem), size)


def size_of(q_len: int, k_len: int, problem: Problem) -> Size:
    group, page = 1 + problem.grouped, 16 * problem.block_table
    size = Size(2, 2 * group, q_len, k_len, group=group, page=page)
    totals = {"q_total": 30, "k_total": 60} if problem.sequences else {}
    return replace(size, **totals, left=9 * problem.left, right=3 * problem.right)


@pytest.mark.slow
@pytest.mark.parametrize("call", list(recorded()), ids=lambda call: str(call.of))
def test_a_recorded_call_is_made_again_and_agrees_with_the_reference(call, device):
    """With the same problem and size, so that an entry serves the calls that it was found for."""
    (kernel, problem), size = call
    workload = Workload(kernel, problem, size, device, copies=1)
    with record() as calls, launch.configured(kernel, BEST):
        assert workload.error() is None
    found = {(again.of, again.size) for again in calls.counts() if again.of.kernel == kernel}
    asked = problem.query_scale_grad and kernel != "grad_key_value"  # whose code it does not change
    changes = {"query_scale_grad": asked or (problem.query_scale and kernel == "grad_query_second")}
    if kernel == "tangent":  # of lse too, whose gradient it is not asked for
        changes["aux"] = False
    assert found == {(Exact(kernel, replace(problem, **changes)), size)}


def results_of(arguments) -> list[torch.Tensor]:
    """The output of a forward or decode kernel, or its tangent; the gradients of q, or of k and v, of a backward."""
    if (tangent := arguments.get("out_tangent_ptr")) is not None:
        return [tangent]
    if "results" in arguments:
        return [arguments["results"].out]
    gradients = arguments.get("gradients", ())
    return [x for x in gradients[:3] if x is not None]


@pytest.mark.parametrize("key", keys()[::2], ids=str)
def test_a_result_that_is_wrong_for_the_last_head_alone(key, device, monkeypatch):
    """A fault in the programs at the end of a grid, which no other head shows."""
    size, run = Size(batch=2, heads=4, q_len=24, k_len=24, group=2), launch.run
    workload = Workload(key.kernel, half(key), size, device, copies=1)

    def spoil(kernel, grid, arguments, config):
        run(kernel, grid, arguments, config)
        if kernel.__name__ == f"attention_{key.kernel}":
            results_of(arguments)[-1][-1, -1] *= 1.2

    assert workload.error() is None
    monkeypatch.setattr(launch, "run", spoil)
    workload._copies[0]._forward = None
    assert "expected an error of at most" in workload.error()
