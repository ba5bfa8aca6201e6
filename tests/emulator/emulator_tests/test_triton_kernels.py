"""Kernels that Triton ships, compiled for sm_80 and sm_90 and executed."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
from ptx_emulator import PTXFault
from ptx_emulator.compile import launch
from ptx_emulator.execute import run_ptx
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from . import kernels

pytestmark = pytest.mark.skipif(knobs.runtime.interpret, reason="TRITON_INTERPRET=1 leaves nothing to compile")
OLDER = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
CAPABILITIES = pytest.mark.parametrize("capability", [80, 90])
newest_triton = pytest.mark.skipif(OLDER, reason="older compilers leave out fences")


def normal(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@CAPABILITIES
def test_add(capability):
    x, y, out = normal(1000), normal(1000, seed=1), torch.full((1000,), torch.nan)
    report = launch(kernels.add, (8,), x, y, out, 1000, BLOCK=128, capability=capability)
    assert report.ok, str(report)
    assert torch.equal(out, x + y)
    assert report.ctas == 8


def test_a_wrong_bound_is_a_fault():
    with pytest.raises(PTXFault) as raised:
        launch(kernels.add, (8,), normal(999), normal(1000), torch.zeros(1000), 1000, BLOCK=128)
    assert "past the end of arg 0 x_ptr float32[999]" in raised.value.nearest
    assert raised.value.loc is not None


@newest_triton
@CAPABILITIES
def test_softmax(capability):
    x, out = normal(5, 300), torch.full((5, 300), torch.nan)
    report = launch(kernels.row_softmax, (5,), x, out, 300, COLUMNS=512, capability=capability)
    assert report.ok, str(report)
    torch.testing.assert_close(out, x.softmax(1), rtol=1e-5, atol=1e-7)


@newest_triton
@pytest.mark.parametrize(
    ("dtype", "stages", "capability"),
    [(torch.float16, 1, 80), (torch.bfloat16, 3, 90), (torch.float32, 3, 80), (torch.float32, 1, 90)],
)
def test_product(dtype, stages, capability):
    a, b = normal(70, 90, dtype=dtype), normal(90, 40, dtype=dtype, seed=1)
    out = torch.full((70, 40), torch.nan)
    report = launch(
        kernels.product, (2,), a, b, out, 70, 40, 90, M=64, N=64, K=32, capability=capability, num_stages=stages
    )
    assert report.ok, str(report)
    tolerance = 1e-2 if dtype == torch.float32 else 1e-5  # Triton multiplies float32 as tf32
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=tolerance, atol=tolerance)
    assert report.counts["tensor"]


@newest_triton
@pytest.mark.parametrize(("width", "stages"), [(32, 1), (64, 3), (128, 3)])
def test_product_by_descriptors(stages, width):
    """Bulk copies to swizzled shared memory, mbarriers, wgmma; ragged sizes are filled with zeros and cut off."""
    a = normal(100, 160, dtype=torch.bfloat16)
    b, out = normal(160, width, dtype=torch.bfloat16, seed=1), torch.full((100, width), torch.nan).bfloat16()
    blocks = ([64, 64], [64, width], [64, width])
    described = [TensorDescriptor.from_tensor(x, block) for x, block in zip((a, b, out), blocks, strict=True)]
    report = launch(
        kernels.described_product, (2,), *described, 160, M=64, N=width, K=64, capability=90, num_stages=stages
    )
    assert report.ok, str(report)
    assert report.counts["tma"]
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-2, atol=1e-2)


def test_random_bits():
    """Philox 4x32-10 of the seed and the counter, by Python's integers."""
    out = torch.zeros(64, dtype=torch.int32)
    assert launch(kernels.random_bits, (1,), out, 1234567, BLOCK=64, num_warps=1).ok
    assert [x & 0xFFFFFFFF for x in out.tolist()] == [_philox(1234567, counter) for counter in range(64)]


def _philox(seed: int, counter: int) -> int:
    c, key = [counter, 0, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [high >> 32 ^ c[1] ^ key[0], high & 0xFFFFFFFF, low >> 32 ^ c[3] ^ key[1], low & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0]


def test_atomics():
    x = torch.arange(512, dtype=torch.int32) % 7
    out = torch.zeros(7, dtype=torch.int32)
    assert launch(kernels.count, (4,), x, out, BLOCK=128).ok
    assert torch.equal(out, torch.bincount(x, minlength=7).int())


def test_results_do_not_depend_on_how_many_run_at_once():
    a, b = normal(200, 90, dtype=torch.float16), normal(90, 40, dtype=torch.float16, seed=1)
    options = {"M": 64, "N": 64, "K": 32, "num_stages": 1}  # the code of a test before
    results = []
    for threads in (128, 4096):
        out = torch.full((200, 40), torch.nan)
        assert launch(kernels.product, (4,), a, b, out, 200, 40, 90, max_threads=threads, **options).ok
        results.append(out)
    assert torch.equal(*results)


def test_arguments_are_checked():
    from ptx_emulator import PTXError

    from .ptx import module

    with pytest.raises(PTXError, match="arguments: expected 1, got 2"):
        run_ptx(module(""), 1, [torch.zeros(1), torch.zeros(1)], num_warps=1)
    with pytest.raises(PTXError, match=r"expected a tensor, got 0\.5"):
        run_ptx(module(""), 1, [0.5], num_warps=1)
    with pytest.raises(PTXError, match="num_warps: expected 1, as the PTX says, got 2"):
        run_ptx(module(""), 1, [torch.zeros(1)], num_warps=2)
    with pytest.raises(PTXError, match=r"expected one \.entry"):
        run_ptx("", 1, [], num_warps=1)
