"""Loads of tiles: 16 bytes at a time, for every head dim whose rows are multiples of 16 bytes."""

import re

import pytest
import torch

from tests.support.tiles import quick_config
from tritonattn.backends.triton import launch
from tritonattn.tuning import Problem, Target, compile_kernel

pytestmark = pytest.mark.skipif(launch.interpreting, reason="TRITON_INTERPRET=1 leaves nothing to compile")

HALF, BFLOAT, SINGLE = torch.float16, torch.bfloat16, torch.float32
PAGES = {"sequences": True, "block_table": True}
CASES = [
    ("grad_query", "sm_90", 40, BFLOAT, {}),
    ("row_terms", "sm_80", 72, SINGLE, {}),
    ("key_statistics", "sm_90", 104, SINGLE, {}),
    ("key_statistics_grad", "sm_80", 136, BFLOAT, {}),
    ("append_keys", "sm_90", 72, BFLOAT, {}),
    ("forward", "sm_80", 40, HALF, PAGES),
]
SLOW = [
    ("forward", "sm_80", 104, BFLOAT, {}),
    ("grad_query", "sm_80", 72, HALF, {}),
    ("grad_key_value", "sm_90", 136, BFLOAT, {}),
    ("decode", "sm_90", 40, SINGLE, {}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_tiles_load_16_bytes_at_a_time(case):
    check_loads(*case)


def check_loads(kernel: str, target: str, dim: int, dtype: torch.dtype, form: dict[str, bool]) -> None:
    """Narrow loads are as many as at the next multiple of 16, where Triton itself sees the alignment."""
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
