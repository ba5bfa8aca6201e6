"""Launches of attention calls on an H100: which memory kernels are handed. No kernel runs."""

import pytest
import torch

pytest.importorskip("triton")
from triton.tools.tensor_descriptor import TensorDescriptor

import tritonattn
from tests.support.caches import cached_call
from tritonattn.backends import triton as triton_backend
from tritonattn.backends.triton import launch
from tritonattn.tuning import Target

SM_90 = Target("cuda", "90")


@pytest.fixture(autouse=True)
def _on_any_device(monkeypatch):
    monkeypatch.setattr(launch, "run", lambda *_: pytest.fail("ran"))


def operands(length: int) -> list[torch.Tensor]:
    return [torch.randn(2, 2, length, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]


def test_an_expanded_gradient_takes_the_code_of_a_dense_one():
    """As of out.sum(): three kernels are not compiled again, and tiles are loaded by descriptors."""
    launched = []
    for gradient in (torch.ones(2, 2, 64, 64), torch.ones(())):
        with launch.recording(SM_90) as launches:
            out = tritonattn.attention(*operands(64), causal=True, backend="triton")
            out.backward(gradient.to(out.dtype).expand_as(out))
        launched.append(launches)
    dense, expanded = ([one.config for one in launches] for launches in launched)
    assert dense == expanded
    strides = {one.arguments["d_out"][1:] for launches in launched for one in launches if "d_out" in one.arguments}
    assert strides == {(8192, 4096, 64, 1)}


def test_operands_at_an_odd_offset_take_the_code_of_aligned_ones():
    """Copies of those alone, equal, for the backward too; an expanded operand, whose copy may be large, stays."""
    shifted = torch.randn(2 * 2 * 64 * 64 + 1, dtype=torch.bfloat16, requires_grad=True)
    (q, k, v), odd = operands(64), shifted[1:].view(2, 2, 64, 64)
    few_heads = k[:, :1].expand(-1, 2, -1, -1)
    launched = []
    for given in ((q, k, v), (odd, k, v), (q, few_heads, v)):
        with launch.recording(SM_90) as launches:
            out = tritonattn.attention(*given, causal=True, backend="triton")
            out.backward(torch.ones_like(out))
        launched.append([one for one in launches if "k" in one.arguments])
    aligned, copied, expanded = launched
    assert [one.config for one in aligned] == [one.config for one in copied] != [one.config for one in expanded]
    for one in copied:
        assert torch.equal(one.arguments["q"].ptr, odd)
        assert one.arguments["q"].ptr.data_ptr() % 16 == 0
        assert one.arguments["k"].ptr.data_ptr() == k.data_ptr()
    assert all(one.arguments["k"].h == 0 for one in expanded)


def test_descriptors_have_legal_strides_along_axes_of_one_entry():
    """No entry is reached by them, and the hardware takes multiples of 16 bytes alone."""
    x = torch.randn(64 * 64, dtype=torch.bfloat16).as_strided((1, 1, 64, 64), (3, 0, 64, 1)).requires_grad_()
    with launch.recording(SM_90) as launches:
        out = tritonattn.attention(x, x, x, backend="triton")
        out.backward(torch.ones_like(out))
    values = [value for one in launches for value in one.arguments.values()]
    described = [value for value in values if isinstance(value, TensorDescriptor)]
    assert len(described) >= 4
    assert {tuple(one.strides[2:]) for one in described} == {(64, 1)}
    assert all(stride > 0 and stride % 8 == 0 for one in described for stride in one.strides[:3])


@pytest.mark.parametrize("name", ["q", "k", "v", "d_out"])
def test_offsets_of_rows_that_pass_int32(name):
    """Kernels are told so, whose products are then of 64 bits (tests/compiled/test_addresses.py)."""
    kernels = {"d_out": (), "q": ("forward",), "k": ("forward",), "v": ("forward",)}[name]
    for stride, is_wide in ((2**22, True), (64, False)):
        strides = {one: stride if one == name else 64 for one in ("q", "k", "v", "d_out")}
        q, k, v, d_out = (
            torch.empty_strided((1, 2, 64, 64), (2**30, 2**29, one, 1), dtype=torch.bfloat16, device="meta")
            for one in strides.values()
        )
        with launch.recording(SM_90) as launches:
            out = tritonattn.attention(*(x.requires_grad_() for x in (q, k, v)), backend="triton")
            out.backward(d_out)
        wide = {one.kernel.__name__ for one in launches if one.arguments.get("WIDE")}
        expected = {f"attention_{one}" for one in (*kernels, "grad_query", "grad_key_value")}
        assert wide >= expected if is_wide else not wide


def test_offsets_in_a_page_pass_int32():
    """2,048 keys 2^20 elements apart, of which no tile has so many."""
    q, lengths, table = torch.randn(1, 2, 1, 64).bfloat16(), torch.tensor([5]), torch.zeros(1, 1, dtype=torch.int32)
    for stride, is_wide in ((2**20, True), (128, False)):
        pages = torch.empty_strided((1, 2048, 2, 64), (0, stride, 64, 1), dtype=q.dtype, device="meta")
        call = cached_call(q, pages, pages, lengths, table)
        with launch.recording(SM_90) as launches:
            triton_backend.decode(call, aux=False)
            triton_backend.forward(call, aux=False)
        assert [one.arguments["WIDE"] for one in launches if "pages" in one.arguments] == [is_wide] * 2


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 1, 1), (2, 2, 64), (64,)], ids=str)
@pytest.mark.parametrize("length", [64, 61])
def test_rows_of_a_mask_begin_at_multiples_of_16_bytes(length, axes):
    q, k, v = operands(64)
    mask = torch.rand(*axes, length) > 0.5
    with launch.recording(SM_90) as launches:
        tritonattn.attention(q, k[:, :, :length], v[:, :, :length], mask=mask, backend="triton")
    record = launches[-1].arguments["masks"].mask
    assert record.ptr.data_ptr() % 16 == 0
    assert [stride % 16 for stride in record[1:4]] == [0, 0, 0]
    assert torch.equal(record.ptr.bool(), mask.expand(2, 2, 64, length))
    assert (record.ptr.data_ptr() == mask.data_ptr()) == (length == 64), "copied only where it must be"
