"""The decode kernels compile for every target in every form, without spills, as a launch compiles them."""

from __future__ import annotations

import itertools

import pytest
import torch

triton = pytest.importorskip("triton")

from tritonattn.backends.triton import launch
from tritonattn.tuner.machine_code import read_machine_code
from tritonattn.tuning import Problem, Target, compile_kernel, default_config

NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx90a", "gfx942", "gfx950")
EVERYTHING = {
    "query_scale": True,
    "key_scale": True,
    "left": True,
    "block_table": True,
    "softcap": True,
    "sinks": True,
    "aux": True,
    "grouped": True,
}

pytestmark = [
    pytest.mark.skipif(launch.interpreting, reason="TRITON_INTERPRET=1 leaves nothing to compile"),
]


def _check(target: str, head_dim: int, rows: int, dtype: torch.dtype = torch.bfloat16, **forms: bool) -> None:
    problem = Problem(head_dim, head_dim, dtype, packed_rows=rows, **forms)
    code = read_machine_code(compile_kernel("decode", problem, target=target))
    assert code.spill_bytes == 0, f"{problem} {target}: {code}"


@pytest.mark.parametrize("target", [*NVIDIA, *AMD])
def test_pages_do_not_spill(target):
    _check(target, 128, 16, query_scale=True, block_table=True)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("target", [*NVIDIA, *AMD])
def test_no_form_spills(target, head_dim):
    """A form for each number of rows, another one for the next target and head dim."""
    forms = itertools.cycle(({}, {"query_scale": True}, EVERYTHING))
    first = (*NVIDIA, *AMD).index(target) + (64, 80, 96, 128, 192, 256).index(head_dim)
    for rows, form in zip((16, 32, 64, 256), itertools.islice(forms, first % 3, None), strict=False):
        _check(target, head_dim, rows, **form)


@pytest.mark.parametrize("forms", [{}, EVERYTHING], ids=["plain", "everything"])
def test_float32_does_not_spill(forms):
    _check("sm_80", 128, 16, torch.float32, **forms)


def test_keys_and_values_of_pages_come_asynchronously():
    """Page numbers are fetched a stage before the keys that they point to, and neither is waited for at once."""
    for forms in ({}, {"block_table": True}):
        compiled = compile_kernel("decode", Problem(128, 128, torch.bfloat16, **forms), target="sm_80")
        loop = compiled.asm["ttgir"].split("scf.for", 1)[1].split("scf.yield", 1)[0]
        assert loop.count("async_copy_global_to_local") == 2 + len(forms)
        assert "tt.load" not in loop


def test_tiles_fit_the_rows():
    target = Target("cuda", "90")

    def rows(packed: int, width: int = 128) -> int:
        return default_config("decode", Problem(width, width, torch.float16, packed_rows=packed), target).block_m

    assert [rows(packed) for packed in (16, 32, 64, 128)] == [16, 32, 64, 64]
    assert rows(64, width=256) == 32
    assert rows(128, width=64) == 64
