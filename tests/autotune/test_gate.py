"""Candidates, the gate that they pass before they are timed, and the tables that are shipped."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from perf.models.static.ranking import static_candidates
from tests.support.versions import OLDER_TRITON
from tritonattn.autotune import gate
from tritonattn.autotune.candidates import candidates
from tritonattn.autotune.gate import Code, examine, memory_reasons
from tritonattn.backends.triton import launch
from tritonattn.tuning import cache_dir, compile_kernel
from tritonattn.tuning.config import FIRST_KERNELS, OPTIONS, TILED_KERNELS, Problem, Target, TileConfig, legal_reasons
from tritonattn.tuning.defaults import default_config
from tritonattn.tuning.gpus import GPUS
from tritonattn.tuning.lookup import usable_table
from tritonattn.tuning.table import RANKED_HEAD_DIMS, keys

SM_80, SM_100 = Target("cuda", "80"), Target("cuda", "100")
GFX950 = Target("hip", "gfx950")
PROBLEM = Problem(64, 64, torch.bfloat16, right=True, query_scale=True)
CONFIG = TileConfig(128, 64, 4, 2)
DIVIDED = TileConfig(128, 128, 8, 2, descriptors=True, warp_specialize=True)
compiled = pytest.mark.skipif(launch.interpreting, reason="TRITON_INTERPRET=1 leaves nothing to compile")


@compiled
def test_code_that_passes():
    found = examine("forward", PROBLEM, CONFIG, Target.parse("gfx942"))
    assert found.reasons == ()
    details = found.details()
    assert 64 <= details["registers"] <= 512
    assert details["spill_bytes"] == 0
    assert details["shared_bytes"] > 8192


@pytest.mark.slow
@compiled
def test_code_that_spills_much_is_refused():
    """64 rows and keys of one warp."""
    reasons = examine("forward", PROBLEM, TileConfig(64, 64, 1, 1), SM_80).reasons
    assert re.fullmatch(r"spills \d{3,} bytes a thread", "; ".join(reasons))


def test_code_that_takes_too_much_memory_is_refused():
    assert memory_reasons(Code(128, 0, 166912, 512), SM_80) == [], "all that there is"
    assert memory_reasons(Code(128, 0, 200000), SM_80) == ["takes 200000 bytes of shared memory, sm_80 has 166912"]
    assert memory_reasons(Code(128, 0, 0, 1024), SM_100) == ["takes 1024 columns of tensor memory, there are 512"]


@pytest.mark.parametrize("gpu", {gpu.target.arch: gpu for gpu in GPUS}.values(), ids=lambda gpu: gpu.name)
def test_candidates(gpu):
    for key in keys():
        found = candidates(key.kernel, key.problem, gpu.target)
        assert found[0] == default_config(key.kernel, key.problem, gpu.target)
        assert len(set(found)) == len(found)
        assert set(static_candidates(key.kernel, key.problem, gpu.target)) <= set(found)
        assert all(not legal_reasons(key.kernel, config, key.problem, gpu.target) for config in found)


def test_options_are_searched_where_the_hardware_has_them():
    """By the search on a card alone: a model that ranks tables knows no order of instructions, and no overlap."""
    for target, options in ((GFX950, {"waves_per_eu": {0, 1, 2, 3}}), (SM_100, {"warp_specialize": {False, True}})):
        found = candidates("forward", PROBLEM, target)
        of_default = {name: {getattr(one, name) for one in found} for name in OPTIONS}
        assert of_default == {name: {value} for name, value in OPTIONS.items()} | options
        ranked = static_candidates("forward", PROBLEM, target)
        assert ranked == [replace(one, **OPTIONS) for one in ranked]
    assert {one.num_stages for one in candidates("grad_query", PROBLEM, GFX950)} == {1, 2}
    assert {one.num_warps for one in candidates("decode", PROBLEM, GFX950)} == {4}


@compiled
def test_waves_per_eu_reach_the_compiler():
    config = TileConfig(16, 16, 4, 1, waves_per_eu=3)
    assert '"amdgpu-waves-per-eu"="3' in compile_kernel("decode", PROBLEM, config, GFX950).asm["llir"]


@pytest.mark.slow
@compiled
@pytest.mark.skipif(OLDER_TRITON, reason="divides other loops")
def test_a_specialised_loop_is_divided_among_warps():
    found = examine("forward", PROBLEM, DIVIDED, SM_100)
    assert found.reasons == ()
    assert 64 <= found.details()["registers"] <= 512


def test_code_that_is_not_divided_among_warps_is_refused():
    def reasons(ttgir: str, code: Code) -> list[str]:
        return gate._unspecialised_reasons(SimpleNamespace(asm={"ttgir": ttgir}), gate.Candidate(CONFIG, code, ()))

    one = "  default {\n  partition0(%a: i32) num_warps(4) {\n"
    two = f"{one}  partition1(%a: i32) num_warps(1) {{\n"
    assert reasons(two, Code(168, 0, 0)) == []
    assert reasons(one, Code(168, 0, 0)) == ["has 1 partitions: its loop is not divided among warps"]
    assert reasons(two, Code(168, 8, 0)) == ["spills 8 bytes a thread where partitions share out the registers"]
    assert reasons(two, Code(4, 0, 0)) == ["has 4 registers: its code is a trap"]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_shipped_tables_are_in_use(gpu):
    """It is of these kernels, has legal entries, one for every key of a call, and is written as its content prints."""
    path = cache_dir.shipped_tables() / f"{gpu.name}.json"
    table = usable_table(path, gpu.target)
    assert path.read_text(encoding="utf-8") == table.text()
    of_calls, every = (set(keys(kernels, RANKED_HEAD_DIMS)) for kernels in (FIRST_KERNELS, TILED_KERNELS))
    assert of_calls <= set(table.entries) <= every
    for key, entry in table.entries.items():
        assert not legal_reasons(key.kernel, entry.config, key.problem, gpu.target)
        assert entry.source == "measured" or entry.details["spill_bytes"] <= 80, "some below 2% of a loop"
