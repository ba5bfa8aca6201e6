"""Loads of tiles: 16 bytes at a time, for every head dim whose rows are multiples of 16 bytes."""

import re

import pytest
import torch

pytest.importorskip("triton")
from tests.support.pairs import all_pairs, thinned
from tritonattn.backends.triton import launch
from tritonattn.tuning import Problem, compile_kernel
from tritonattn.tuning.config import TILED_KERNELS

pytestmark = pytest.mark.skipif(launch.interpreting, reason="TRITON_INTERPRET=1 leaves nothing to compile")

KERNELS = (*TILED_KERNELS, "row_terms", "key_statistics", "key_statistics_grad", "append_keys")
CASES = [
    (row["kernel"], row["target"], row["dim"], row["dtype"])
    for row in thinned(
        all_pairs(
            {
                "kernel": KERNELS,
                "target": ("sm_80", "sm_90"),
                "dim": (40, 72, 104, 136),
                "dtype": (torch.bfloat16, torch.float32),
            }
        ),
        [("kernel", "dim")],
    )
]
QUICK = CASES[5::2]  # the forward kernel is that over pages


@pytest.mark.parametrize(("kernel", "target", "dim", "dtype"), QUICK)
def test_tiles_load_16_bytes_at_a_time(kernel, target, dim, dtype):
    check_loads(kernel, target, dim, dtype)


def test_pages_load_16_bytes_at_a_time():
    check_loads("forward", "sm_80", 40, torch.float16, sequences=True, block_table=True)


def check_loads(kernel: str, target: str, dim: int, dtype: torch.dtype, **form: bool) -> None:
    """Narrow loads are as many as at the next multiple of 16, where Triton itself sees the alignment."""
    wider = -(-dim // 16) * 16
    assert narrow_loads(kernel, target, dim, dtype, **form) == narrow_loads(kernel, target, wider, dtype, **form)


def narrow_loads(kernel: str, target: str, dim: int, dtype: torch.dtype, **form: bool) -> int:
    """Loads of fewer than 16 bytes in a kernel's code: those of vectors over rows and keys.

    Row terms are read without what rounding took from an output: rows of 8 bits a number are multiples of 8 bytes only.
    """
    problem = Problem(dim, dim, dtype, right=True, rounding=dtype == torch.bfloat16 and kernel != "row_terms", **form)
    code = compile_kernel(kernel, problem, target=target).asm["ptx"]
    loads = re.findall(r"ld\.global[\w.:]*", code)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global [^,]*,[^,]*, (0x[0-9a-f]+|\d+)", code)
    assert loads or copies
    narrow = [load for load in loads if not load.endswith((".v4.b32", ".v2.b64", ".v8.b32"))]
    return len(narrow) + sum(int(size, 0) < 16 for size in copies)


def test_rows_of_an_odd_stride_load_number_by_number():
    """So that the count above can fail."""
    problem = Problem(40, 40, torch.bfloat16, right=True, aligned=False)
    code = compile_kernel("forward", problem, target="sm_80").asm["ptx"]
    assert len(re.findall(r"ld\.global\S*b16 ", code)) > 64
