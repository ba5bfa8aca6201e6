"""The decode kernels compile for every target in every form, without spills, as a launch compiles them."""

from __future__ import annotations

import itertools

import pytest
import torch

triton = pytest.importorskip("triton")
from tests.support.caches import GrowingCache, sequences
from tritonattn import attention_decode
from tritonattn.backends.triton import launch
from tritonattn.calls import dispatch
from tritonattn.tuner.machine_code import read_machine_code
from tritonattn.tuning import Problem, Target, TileConfig, compile_kernel, default_config
from tritonattn.tuning.compile import specialisation

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


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("everything", [False, True])
def test_aot_specialisation_is_that_of_a_launch(page, everything, monkeypatch):
    seen = {}
    monkeypatch.setattr(launch, "run", lambda kernel, grid, arguments, config: seen.update({kernel: arguments}))
    monkeypatch.setattr(dispatch, "_check_kernels_run_on", lambda device: None)
    q, k, v = sequences(torch.float16, batch=2, length=20, dims=(64, 64))
    cache = GrowingCache(k, v, 1024, page, statistics=True)
    cache.write(20)
    forms = {"block_table": page is not None, "grouped": True}
    options = {}
    if everything:
        forms = {**EVERYTHING, **forms}
        options = {
            "gain": torch.ones(4, 1),
            "scaling": "cosine",
            "window": (900, 0),
            "softcap": 1.0,
            "sinks": torch.ones(4),
            "return_aux": True,
        }
    lengths = {"key_lengths": cache.lengths.int()}
    attention_decode(cache.newest(q, 2), **{**cache.arguments(), **lengths}, **options, backend="triton")
    problem = Problem(64, 64, torch.float16, **forms)
    assert len(seen) == 2
    for kernel, arguments in seen.items():
        signature, constants, _ = specialisation(kernel, problem, TileConfig(16, 64, 4, 2), Target("cuda", "80"))
        for name, value in arguments.items():
            if name == "sinks_ptr" and value is None and everything:
                continue  # where there are several splits, their combination takes the sinks
            if isinstance(value, torch.Tensor):
                short = {torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}[value.dtype]
                assert signature[name] == short, name
            elif value is None or ("_stride_" in name and value == 1):
                assert constants[name] == value, name
            elif not name.isupper():
                assert signature[name] in ("i32", "fp32"), name
