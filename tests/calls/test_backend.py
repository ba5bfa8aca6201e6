"""The backend that a call runs on, and the calls that each backend refuses."""

import warnings

import pytest
import torch

import tritonattn
from tests.support.calls import operands
from tests.support.masks import MASKS
from tritonattn.backends import by_kernels, choose
from tritonattn.core.call import Request
from tritonattn.core.hints import warn_once
from tritonattn.core.terms import Terms
from tritonattn.core.visibility import Visibility


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch):
    launch = pytest.importorskip("tritonattn.backends.triton.launch", exc_type=ImportError)
    monkeypatch.setattr(launch, "interpreting", False)
    message = r"backend: expected tensors on a CUDA or HIP device for 'triton', got cpu.*TRITON_INTERPRET=1"
    with pytest.raises(ValueError, match=message):
        tritonattn.attention(*operands(torch.float32).values(), backend="triton")


def test_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(by_kernels, "_HAS_TRITON", False)
    with pytest.raises(ImportError, match=r"backend: 'triton' needs .* pip install \"triton>=3.4\""):
        tritonattn.attention(*operands(torch.float32).values(), backend="triton")
    tritonattn.attention(*operands(torch.float32).values())


@pytest.mark.parametrize(
    ("argument", "dtype", "dims"),
    [
        ("q of dtype torch.float64", torch.float64, (8, 8)),
        ("head_dim 513", torch.float32, (513, 8)),
        ("head_dim 600", torch.float32, (8, 600)),
    ],
)
def test_calls_that_triton_refuses(argument, dtype, dims):
    leaves = operands(dtype, dims=dims)
    with pytest.raises(NotImplementedError, match=f"^{argument}.*backend 'triton'.*'sdpa' and 'reference'"):
        tritonattn.attention(*leaves.values(), backend="triton")
    for backend in ("sdpa", "reference"):
        tritonattn.attention(*leaves.values(), backend=backend)


@pytest.mark.parametrize(
    ("dtype", "dim", "chosen", "reason"),
    [
        (torch.float32, 320, {"90": "triton", "75": "sdpa"}, "head_dim 320 of torch.float32"),
        (torch.float16, 8, {"75": "sdpa", "80": "triton"}, "sm_75, for whose tensor cores"),  # as a T4
    ],
)
def test_a_card_that_lacks_memory_or_tensor_cores(dtype, dim, chosen, reason, monkeypatch):
    config = pytest.importorskip("tritonattn.tuning.config")
    q, k, v = (x.detach().as_subclass(OnGpu) for x in operands(dtype, dims=(dim, 8)).values())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: dim == 8)
    for arch, backend in chosen.items():
        monkeypatch.setattr(config.Target, "of", lambda _, arch=arch: config.Target("cuda", arch, "a card"))
        by_kernels._kept_obstacle_of_card.cache_clear()
        warn_once.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert choose(called(q, k, v)).name == backend
        assert [reason in str(one.message) for one in caught] == [True] * (backend == "sdpa")
        if backend == "sdpa":
            with pytest.raises(NotImplementedError, match=f"{reason}.*'triton' does not support"):
                choose(called(q, k, v, backend="triton"))
    by_kernels._kept_obstacle_of_card.cache_clear()


def called(q, k, v, **options):
    """A request of `attention` before it is run."""
    return Request(q, k, v, Visibility.of(q, k), Terms(), **options)


class OnGpu(torch.Tensor):
    """A CPU tensor that says it lies on a GPU: enough to see which backend is chosen."""

    device = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("installed", "dtype", "dim", "arguments", "backend", "reason"),
    [
        (True, torch.float32, 8, {}, "triton", None),
        (True, torch.bfloat16, 256, {}, "triton", None),
        (False, torch.float32, 8, {}, "sdpa", "triton is not installed"),
        (True, torch.float64, 8, {}, "sdpa", "float64"),
        (True, torch.float32, 513, {}, "sdpa", "head_dim 513"),
        (True, torch.float16, 8, {"dropout_p": 0.1, "aux": True}, "triton", None),
    ],
)
def test_auto_on_a_gpu(installed, dtype, dim, arguments, backend, reason, monkeypatch):
    monkeypatch.setattr(by_kernels, "_HAS_TRITON", installed)
    warn_once.cache_clear()
    q, k, v = (x.detach().as_subclass(OnGpu) for x in operands(dtype, dims=(dim, 8)).values())
    if reason is None:
        assert choose(called(q, k, v, **arguments)).name == backend
        return
    with pytest.warns(UserWarning, match=f"'sdpa' instead of 'triton': {reason}|{reason}"):
        assert choose(called(q, k, v, **arguments)).name == backend
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        assert choose(called(q, k, v, **arguments)).name == backend


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_meta_device_tells_shapes(mask, backend):
    leaves = {name: x.detach().to("meta").requires_grad_() for name, x in operands(torch.bfloat16).items()}
    masks = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in MASKS[mask](2, 4, 5, 7).items()}
    out = tritonattn.attention(**leaves, scaling="key_norm_max", backend=backend, **masks)
    assert (out.shape, out.dtype, out.device.type) == ((2, 4, 5, 6), torch.bfloat16, "meta")
    gradients = torch.autograd.grad(out, list(leaves.values()), out)
    assert [x.shape for x in gradients] == [x.shape for x in leaves.values()]
