"""Arguments of ahead-of-time compilation: a launch on tensors without memory; nothing is compiled."""

from dataclasses import replace

import pytest
import torch
from triton.backends.compiler import GPUTarget

from tritonattn.backends.triton import KERNELS, device, launch
from tritonattn.backends.triton import compile as ahead
from tritonattn.tuning import Problem, Target, TileConfig

TILES = TileConfig(64, 32, 4, 2)
PROBLEM = Problem(64, 128, torch.bfloat16)
SM_90 = Target("cuda", "90")

pytestmark = pytest.mark.skipif(launch.interpreting, reason="TRITON_INTERPRET=1 leaves nothing to compile")


def source_of(problem: Problem, **changed):
    asked = ahead.launch_of("forward", problem, TILES, SM_90)
    arguments = {**asked.arguments, **changed}
    return ahead.specialised(asked.kernel, arguments, device.compile_options(TILES), GPUTarget("cuda", 90, 32))


def test_pointers_and_strides_are_multiples_of_16_but_for_unaligned_rows():
    names = KERNELS["forward"].arg_names
    q = names.index("q")
    divisible = [["tt.divisibility", 16]]
    aligned = source_of(PROBLEM)
    unaligned = source_of(replace(PROBLEM, aligned=False))
    assert [aligned.attrs[q, member] for member in range(4)] == [divisible] * 4
    assert aligned.constants[q, 4] == 1
    assert unaligned.attrs[q, 0] == divisible
    assert not any(unaligned.attrs.get((q, member)) for member in (3, 4))
    assert not aligned.attrs.get((names.index("q_len"),)), "lengths are not specialised"


def test_pages_of_any_number_and_size_have_one_code():
    problem = replace(PROBLEM, sequences=True, block_table=True)
    sources = [source_of(problem)]
    for pages in (1, 32, 33), (16, 17, 2048), (10, 48, 1), (3, 2**17, 5), (3, 2**16, 5):
        table = torch.empty(3, pages[2], dtype=torch.int32, device="meta")
        sources.append(source_of(problem, pages=launch.pages_of(table, *pages[:2])))
    assert len({source.hash() for source in sources}) == 1
