"""Machine code of the forward in Gluon: products are issued together, softmax runs under the second, nothing spills."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from perf.models.ceilings import GLUON_NON_MMA_PER_LOGIT, GLUON_SHARE
from perf.models.replay import replay
from perf.models.replay.loops import hot_loop
from perf.models.replay.operations import operations
from perf.models.replay.parameters import PARAMETERS
from tests.support.versions import OLDER_TRITON
from tritonattn.backends.triton import launch
from tritonattn.tuning import Problem, Target, compile_kernel
from tritonattn.tuning.config import legal_reasons
from tritonattn.tuning.defaults import gluon_config

from .facts import facts

pytestmark = [
    pytest.mark.skipif(launch.interpreting, reason="TRITON_INTERPRET=1 leaves nothing to compile"),
    pytest.mark.skipif(OLDER_TRITON, reason="the limits are of one compiler's code"),
]
H100 = Target.parse("sm_90")


def check(head_dim: int, causal: bool) -> None:
    problem = Problem(head_dim, head_dim, torch.bfloat16, query_scale=True, right=causal)
    config = gluon_config(problem, H100)
    assert config is not None
    compiled = compile_kernel("forward", problem, config, H100)
    code, loop = hot_loop(compiled)
    assert code.spill_bytes == 0
    assert code.stack_bytes <= (48 if causal and head_dim == 64 else 0), "what is kept over the loops may be spilled"

    instructions = [instruction for instruction, _ in loop.body]
    barriers = [one for one in instructions if one.name == "BAR"]
    assert all(one.operands.endswith(", 0x80") for one in barriers), "barriers are of a consumer, not of the program"
    path = operations(loop.body, loop.labels, PARAMETERS["90"])
    products = [at for at, one in enumerate(path) if one.act == "product"]
    waits = [(at, one.amount) for at, one in enumerate(path) if one.act == "product wait"]
    (first_wait, _), (last_wait, _) = waits
    assert [amount for _, amount in waits] == [1, 0]
    assert products[-1] < first_wait, "both products are issued before either is waited for"
    exponentials = [at for at, one in enumerate(path) if one.name == "MUFU"]
    assert first_wait < exponentials[0]
    between = sum(one.name.startswith("FMNMX") for one in path[first_wait:last_wait])
    assert between >= 30, "rows take their maxima under the second product; ptxas puts the exponentials behind its wait"

    a_logit = loop.work.other * 4 * 32 / (64 * config.block_n * loop.work.tiles)  # four warps have 64 rows
    assert a_logit <= GLUON_NON_MMA_PER_LOGIT[head_dim]
    found = replay(compiled, config, H100)
    assert found.share >= GLUON_SHARE[head_dim]
    assert not found.is_serialised


@pytest.mark.slow
def test_unmasked_loop():
    check(64, causal=False)


def check_form(form: str) -> None:
    """A thread of three consumers has 160 registers: they would spill 76 to 684 bytes (static, triton 3.9)."""
    plain = Problem(64, 64, torch.bfloat16, query_scale=True, right=True)
    problem = replace(plain, **{form: True})
    configs = [gluon_config(one, H100) for one in (plain, problem)]
    assert [config.block_m for config in configs if config] == [192, 128]
    assert facts("forward", problem, "sm_90", configs[1]).spill_bytes == 0


def test_configs_that_would_not_compile_are_refused():
    """For a target without wgmma LLVM ends the process: nothing may get as far as the compiler."""
    problem = Problem(128, 128, torch.bfloat16)
    config = gluon_config(problem, H100)
    assert config is not None
    for name in ("sm_80", "sm_100", "sm_103", "sm_120", "gfx942"):
        assert gluon_config(problem, Target.parse(name)) is None
        with pytest.raises(ValueError, match="gluon needs forward on sm_90"):
            compile_kernel("forward", problem, config, name)
    for kernel in ("grad_query", "grad_key_value", "decode"):
        assert legal_reasons(kernel, config, problem, H100)
    for option in ("mask", "dropout", "block_table", "invariant"):
        assert gluon_config(replace(problem, **{option: True}), H100) is None
    assert gluon_config(replace(problem, dtype=torch.float32), H100) is None
    assert gluon_config(replace(problem, aligned=False), H100) is None
    for rows, keys in ((192, 128), (64, 128), (128, 256)):
        assert legal_reasons("forward", replace(config, block_m=rows, block_n=keys), problem, H100)
