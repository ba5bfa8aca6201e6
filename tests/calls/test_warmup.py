"""`warmup`, and the refusal to compile while a CUDA graph is captured."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tritonattn import warmup
from tritonattn.calls import attention as api


def test_a_capture_keeps_no_other_thread_from_compiling(monkeypatch):
    """The hook is one for the whole process, and so is that of whoever put one there before."""
    triton = pytest.importorskip("triton")
    from tritonattn.backends.triton import KERNELS, device

    capturing, noted = threading.current_thread(), []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: threading.current_thread() is capturing)
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **options: noted.append(options))
    hook = triton.knobs.runtime.jit_cache_hook
    with device._no_compilation_in_capture(KERNELS["forward"]), ThreadPoolExecutor(1) as pool:
        assert not pool.submit(triton.knobs.runtime.jit_cache_hook, key="another").result()
    assert noted == [{"key": "another"}]
    assert triton.knobs.runtime.jit_cache_hook is hook


def test_it_makes_the_calls_that_are_to_come(monkeypatch):
    noted = []
    attention = api.attention

    def watch(q, k, v, **options):
        noted.append((q.shape, k.shape, v.shape, q.dtype, q.requires_grad and torch.is_grad_enabled(), options))
        return attention(q, k, v, **options)

    monkeypatch.setitem(warmup.__globals__, "attention", watch)
    of_each = ((2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 6))
    warmup([(1, 2, 4, 16), of_each], dtype=torch.float16, device="cpu", backward=True, causal=True, return_aux=True)
    rest = [(torch.float16, with_graph, {"causal": True, "return_aux": True}) for with_graph in (False, True)]
    assert noted == [(*shapes, *one) for shapes in ([(1, 2, 4, 16)] * 3, of_each) for one in rest]
