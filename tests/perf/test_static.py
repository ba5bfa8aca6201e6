"""The static gate: conditions on machine code, which shipped entries meet."""

from dataclasses import replace

import pytest
import torch

from perf.static.gate import examine, gate_reasons
from perf.static.machine_code import MachineCode, MmaLoop
from tests.support.versions import OLDER_TRITON
from tritonattn.backends.triton import launch
from tritonattn.tuning import cache_dir
from tritonattn.tuning.config import Problem, Target, TileConfig
from tritonattn.tuning.defaults import default_config
from tritonattn.tuning.gpus import GPUS
from tritonattn.tuning.lookup import usable_table
from tritonattn.tuning.table import RANKED_HEAD_DIMS, keys

SM_80, SM_90 = Target("cuda", "80"), Target("cuda", "90")
PROBLEM = Problem(64, 64, torch.bfloat16, right=True, query_scale=True)
CONFIG = TileConfig(128, 64, 4, 2)
compiled = pytest.mark.skipif(launch.interpreting, reason="TRITON_INTERPRET=1 leaves nothing to compile")


def code(registers: int = 128, spill: int = 0, shared: int = 49152, exp: int = 64, other: int = 400) -> MachineCode:
    mix = {"tensor": 128, "exp": exp, "fp32": 200, "integer": other}
    loop = MmaLoop(mix, packed=0, tiles=1, flops=128 * 64 * 256, shared_bytes=65536)
    return MachineCode(registers, 0, shared, spill, 0, (loop,))


def test_the_gate():
    def reasons(found: MachineCode, target: Target = SM_80) -> str:
        return "; ".join(gate_reasons("forward", PROBLEM, CONFIG, target, found))

    assert reasons(code()) == ""
    [loop] = code().mma_loops
    spilling = {local: replace(loop, instructions=loop.instructions | {"local": local}) for local in (15, 17)}
    spills = {local: reasons(replace(code(spill=8), mma_loops=(one,))) for local, one in spilling.items()}
    assert spills == {15: "", 17: "spills 8 bytes a thread in a loop"}, "of 792 other instructions"
    assert "spills 8 bytes" in reasons(MachineCode(300, 0, 0, 8, 0, None), Target("hip", "gfx942"))
    serialised = replace(loop, products=2, product_waits=24)
    assert "waits 24 times for 2 products" in reasons(replace(code(), mma_loops=(serialised,)))
    assert reasons(replace(code(), mma_loops=(replace(serialised, product_waits=2),))) == ""
    assert "takes 200000 bytes of shared memory, sm_80 has 166912" in reasons(code(shared=200000))
    assert reasons(code(shared=166912)) == reasons(replace(code(), tensor_memory=512)) == "", "all that there is"
    assert "1.75 exponentials a logit" in reasons(code(exp=128)), "2 less those of 4 lanes of 4 warps for a row of 64"
    assert reasons(code(exp=80)) == "", "1.25, of which 0.25 correct earlier sums"
    assert "1.25 exponentials a logit" in gate_reasons("grad_query", PROBLEM, CONFIG, SM_80, code(exp=80))[0]
    assert gate_reasons("decode", PROBLEM, CONFIG, SM_80, code(exp=80)) == [], "of few rows lanes repeat them"
    [once] = code().mma_loops
    unrolled = replace(once, instructions=once.instructions | {"exp": 128}, tiles=2)
    assert reasons(replace(code(), mma_loops=(unrolled,))) == ""
    assert "no loop" in reasons(MachineCode(128, 0, 0, 0, 0, ()))
    assert "tensor memory" in reasons(MachineCode(128, 0, 0, 0, 1024, code().mma_loops))
    assert reasons(MachineCode(300, 0, 0, 0, 0, None), Target("hip", "gfx942")) == ""


@compiled
def test_a_softcap_takes_exponentials_of_its_own():
    """Else no config of such a call would pass; one that repeats them still does not."""
    capped = replace(PROBLEM, softcap=True)
    assert examine("grad_query", capped, default_config("grad_query", capped, SM_80), SM_80).reasons == ()
    assert "2.00 exponentials a logit" in gate_reasons("grad_query", capped, CONFIG, SM_80, code(exp=384))[0]


@compiled
def test_eight_warps_on_the_rows_of_one_wgmma_repeat_their_softmax():
    [reason] = examine("forward", PROBLEM, TileConfig(64, 64, 8, 2), SM_90).reasons
    assert "warps repeat each other's softmax" in reason


ENTRIES = [(gpu, key) for gpu in GPUS for key in keys(head_dims=RANKED_HEAD_DIMS)]


@compiled
def test_a_shipped_entry_passes_the_gate():
    check_shipped_entry(0)


def check_shipped_entry(position: int) -> None:
    """Check the entry at a position of all tables; they hold for the code of triton 3.9."""
    if OLDER_TRITON:
        pytest.skip("the tables are of another compiler's code")
    gpu, key = ENTRIES[position]
    entry = usable_table(cache_dir.shipped_tables() / f"{gpu.name}.json", gpu.target).entries[key]
    assert examine(key.kernel, key.problem, entry.config, gpu.target).reasons == ()
