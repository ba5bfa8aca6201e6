"""The decode kernels compile for every target in every form, without spills, as a launch compiles them."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
from tests.support.caches import GrowingCache, sequences
from tritonattn import attention_decode
from tritonattn.backends.triton import launch
from tritonattn.calls import dispatch
from tritonattn.tuning import Problem, Target, TileConfig, default_config
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
