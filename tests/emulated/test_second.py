"""The kernels of derivatives beyond the first, of sm_80 and sm_90: values to the bound, no overrun, no race."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.derivatives import SCALES, case_of
from tritonattn.core.terms import Gradients
from tritonattn.tuning import TileConfig

from .cases import CPU
from .executor import GPU, padded

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script")  # of the first torch.func.jvp


CASES = {
    "sm_80": (GPU(80), TileConfig(16, 16, 1, 2), torch.bfloat16, f"{SCALES} sinks softcap", (16, 16), (17, 18)),
    "warpgroup": (GPU(90), TileConfig(64, 16, 4, 2), torch.float16, SCALES, (32, 32), (70, 90)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_derivatives(name, emulate):
    """Biases of pairs are the preflight's (tests/slow/test_perf.py)."""
    gpu, tiles, dtype, form, dims, lengths = CASES[name]
    executor = emulate(gpu, tiles)
    case = case_of(form, CPU, dtype, dims, lengths)
    q, k, v = (padded(x) for x in case.call.tensors()[:3])
    case.call = case.call.changed(q=q, k=k, v=v)
    case.tangents = Gradients(*(padded(x) for x in case.tangents[:3]), *case.tangents[3:])
    case.d_out = padded(case.d_out)
    case.check()
    names = ["tangent", "tangent", "grad_query_second", "grad_key_value_second"]
    ours = [name for name in executor.launched if name.startswith("attention_")]
    assert ours[-4:] == [f"attention_{name}" for name in names]
