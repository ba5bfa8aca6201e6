"""Offsets in memory are products of 64 bits: no tensor's extent is bounded, and small tests would not see them wrap."""

import re
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from tests.support.tiles import quick_config
from tests.support.versions import TRITON
from tritonattn.backends.triton import KERNELS, launch
from tritonattn.backends.triton.compile import compile_launch, launch_of
from tritonattn.backends.triton.records import Scale, Strided
from tritonattn.tuning import Problem, Target, TileConfig
from tritonattn.tuning.defaults import gluon_config

pytestmark = [
    pytest.mark.skipif(launch.interpreting, reason="TRITON_INTERPRET=1 leaves nothing to compile"),
    pytest.mark.skipif(TRITON < (3, 5), reason="other names of operations"),
]
SM_80, SM_90 = Target.parse("sm_80"), Target.parse("sm_90")
TERMS = "query_scale key_scale key_bias bias relative_bias relative_scale sinks aux grouped query_scale_grad rounding"
PADDED = f"{TERMS} left right key_lengths key_ranges mask dropout"
PAGED = f"{TERMS} left right sequences block_table"
CASES = [*((kernel, PADDED) for kernel in KERNELS), ("forward", PAGED), ("decode", PAGED)]

_OPERATION = re.compile(r'\s*%([\w.#-]+)(?::\d+)? = "?([\w.]+)"? ?(.*?) : (.*)')
_LINEAR = {f"arith.{name}" for name in ("addi", "muli", "extsi")}  # no division, whose results are small
_LINEAR |= {f"tt.{name}" for name in ("splat", "broadcast", "expand_dims", "reshape")} | {"ttg.convert_layout"}
_COUNTS_OF_HEADS = {"q_heads", "group"}  # a product with them is the number of a head


class _Stopped(Exception):
    """Carries Triton's IR of a kernel."""


@pytest.fixture
def stopped(monkeypatch, tmp_path) -> None:
    """Compilation ends with `_Stopped` behind its first stage, and finds no code from before."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    backend = type(make_backend(GPUTarget("cuda", 80, 32)))
    add_stages = backend.add_stages

    def add(self: Any, stages: dict, *rest: Any) -> None:
        def stop(module: Any, _: Any) -> None:
            raise _Stopped(str(module))

        add_stages(self, stages, *rest)
        stages[list(stages)[1]] = stop

    monkeypatch.setattr(backend, "add_stages", add)


def with_steps(x: Any) -> Any:
    """The record of a tensor of which no axis is dense, lest the compiler drop a product with 1."""
    if isinstance(x, Strided):
        return x._replace(d=2)
    return x._replace(s=2) if isinstance(x, Scale) else x


def narrow_products(ir: str) -> set[str]:
    """The products of 32 bits, but with constants, that a pointer moves by."""
    in_values: dict[str, set[str]] = {}
    constants, in_pointers, pointers = set(), set(), 0
    for value, operation, rest, type_ in (found.groups() for found in map(_OPERATION.match, ir.splitlines()) if found):
        operands = re.findall(r"%([\w.#-]+)", rest)
        in_values[value] = set()
        constants.discard(value)  # a loop's names come again in the next one
        if operation == "arith.constant":
            constants.add(value)
        elif operation in _LINEAR:
            in_values[value].update(*(in_values.get(operand, ()) for operand in operands))
            is_narrow = operation == "arith.muli" and re.match(r"(tensor<[\dx]*)?i32\b", type_)
            if is_narrow and (constants | _COUNTS_OF_HEADS).isdisjoint(operands):
                in_values[value].add(value)
        elif operation == "tt.addptr":
            in_pointers |= in_values.get(operands[1], set())
            pointers += 1
    assert pointers
    return in_pointers


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize(("kernel", "form"), CASES, ids=[f"{kernel}-{form.split()[-1]}" for kernel, form in CASES])
def test_products_are_of_64_bits(kernel, form):
    problem = Problem(16, 16, torch.bfloat16, **dict.fromkeys(form.split(), True))
    check(kernel, problem, quick_config(kernel, problem, SM_80), SM_80)


@pytest.mark.usefixtures("stopped")
@pytest.mark.skipif(TRITON < (3, 6), reason="Gluon needs triton 3.6")
def test_products_in_gluon_are_of_64_bits():
    form = "query_scale key_scale key_bias sinks aux grouped rounding left right key_lengths key_ranges softcap"
    problem = Problem(64, 64, torch.bfloat16, **dict.fromkeys(form.split(), True))
    config = gluon_config(problem, SM_90)
    assert config is not None
    check("forward", problem, config, SM_90)


def check(kernel: str, problem: Problem, config: TileConfig, target: Target) -> None:
    one = launch_of(kernel, problem, config, target)
    arguments = {name: with_steps(x) for name, x in one.arguments.items()}
    arguments |= {name: 1000 for name in ("splits", "part_rows") if name in arguments}
    arguments |= {"WIDE": True} if "WIDE" in arguments else {}
    with pytest.raises(_Stopped) as stopped:
        compile_launch(one._replace(arguments=arguments), target)
    assert not narrow_products(str(stopped.value))
