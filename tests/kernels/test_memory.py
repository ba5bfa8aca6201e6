"""The forward and backward kernels on tensors that lie in memory in every way."""

import pytest
import torch

import tritonattn
from tests.kernels import harness
from tritonattn.backends.triton import launch
from tritonattn.backends.triton.interpreter import tensors_of

pytestmark = pytest.mark.usefixtures("small_tiles")


def _variants(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in other memory: transposed axes, a strided last axis, an offset, padding between rows."""
    padded = torch.nn.functional.pad(tensor, (1, 3, 2, 0))
    strided = tensor.new_empty(*tensor.shape[:3], 2 * tensor.shape[3])[..., ::2]
    return {
        "transposed": tensor.transpose(1, 2).contiguous().transpose(1, 2),
        "last axis outermost": tensor.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        "every other element": strided.copy_(tensor),
        "slice of a larger tensor": padded[:, :, 2:, 1 : 1 + tensor.shape[3]],
    }


def test_strides(device):
    """Kernels read the strides at head dims whose rows no copy would align."""
    sizes = {"batch": 2, "kv_heads": 2, "group": 1, "q_len": 5, "k_len": 18, "head_dim": 13, "value_dim": 13}
    tensors = harness.inputs(torch.float32, device, **sizes)
    expected = harness.by_kernels(tensors)
    for layout, d_out in _variants(torch.ones_like(tensors["q"])).items():
        views = {name: _variants(tensor)[layout] for name, tensor in tensors.items()}
        harness.assert_same(harness.by_kernels(views, d_out=d_out), expected)


def test_lazily_negated_tensors(device):
    """Their memory holds the negatives of their values."""
    tensors = harness.inputs(torch.float32, device, batch=1, q_len=20, k_len=20, group=1)
    expected = harness.by_kernels(tensors, d_out=tensors["q"])
    negated = {name: torch.complex(x, -x).conj().imag for name, x in tensors.items()}
    assert all(x.is_neg() for x in negated.values())
    leaves = {name: x.requires_grad_() for name, x in negated.items()}
    out = tritonattn.scaled_attention(**leaves, backend="triton")
    gradients = torch.autograd.grad(out, list(leaves.values()), negated["q"].detach())
    for name, result in zip(("out", *leaves), (out, *gradients), strict=True):
        torch.testing.assert_close(result, expected[name], msg=name)


@pytest.mark.usefixtures("new_memory_holds_nan")
@pytest.mark.parametrize("scales", [(), ("query_scale", "sinks"), ("bias",)])
def test_no_launch_overwrites_what_another_left(scales, device, monkeypatch):
    """A pass that corrects an earlier one's terms has an output of its own for them."""
    run, left = launch.run, []

    def bits(x):
        return x.flatten().view(torch.uint8).clone()

    def watch(kernel, grid, arguments, config):
        tensors = list(tensors_of(arguments.values()))
        before = [bits(x) for x in tensors]
        run(kernel, grid, arguments, config)
        written = [x for x, old in zip(tensors, before, strict=True) if not torch.equal(bits(x), old)]
        assert written
        assert not {x.data_ptr() for x in written} & {x.data_ptr() for x in left}, kernel.__name__
        left.extend(written)

    monkeypatch.setattr(launch, "run", watch)
    harness.by_kernels(harness.inputs(torch.float32 if not scales else torch.float16, device, scales=scales))
    assert len(left) >= 6
