"""8 bits next to a 16-bit number restore what it was before it was rounded, in kernels as on a CPU."""

import pytest
import torch
import triton
import triton.language as tl

from tritonattn.backends.triton.backward import before_rounding
from tritonattn.backends.triton.softmax import lost_in_rounding
from tritonattn.core import rounding

SPECIAL = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-45, 2.0**-126 - 2.0**-140]
SPECIAL += [65519.0, 65520.0, -7e4, 2.0**-25, -(2.0**-24)]  # where fp16 ends


@triton.jit
def _round_trip(exact_ptr, rounded_ptr, lost_ptr, restored_ptr, SIZE: tl.constexpr):
    offs = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    rounded = tl.load(rounded_ptr + offs)
    lost = lost_in_rounding(tl.load(exact_ptr + offs), rounded)
    tl.store(lost_ptr + offs, lost)
    tl.store(restored_ptr + offs, before_rounding(rounded, lost))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_restored_numbers(dtype, device):
    """Every fp32 next to 1, where the last place changes, ties, random numbers of every size, and special ones."""
    near = torch.arange(-(2**16), 2**16, dtype=torch.int32) + torch.tensor(1.0).view(torch.int32)
    random = torch.randn(2**14, generator=torch.Generator().manual_seed(0))
    sizes = torch.linspace(-40, 15, 2**14).exp2()
    exact = torch.cat([near.view(torch.float32), -near.view(torch.float32), random * sizes, torch.tensor(SPECIAL)])
    exact = torch.cat([exact, exact.new_ones(-len(exact) % 1024)]).to(device)
    rounded, restored = exact.to(dtype), torch.empty_like(exact)
    lost = torch.empty_like(exact, dtype=torch.int8)
    _round_trip[(len(exact) // 1024,)](exact, rounded, lost, restored, SIZE=1024)

    real = ~exact.isnan()
    assert torch.equal(lost[real], rounding.lost_in_rounding(exact, rounded)[real])
    torch.testing.assert_close(restored, rounding.before_rounding(rounded, lost), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(restored.isnan(), ~real)
    assert (lost[rounded == exact] == 0).all()
    error = (restored.double() - exact.double()).abs()
    assert (error <= (rounded.double() - exact.double()).abs())[rounded.isfinite()].all()
    normal = rounded.isfinite() & (exact.abs() >= torch.finfo(dtype).tiny)
    last_place = torch.finfo(dtype).eps * exact.double().abs().log2().floor().exp2()
    assert (error <= last_place / 256)[normal].all()
    assert error[normal].mean() < last_place[normal].mean() / 900
