"""Calls of an installed library by backend "flash", and their gradients, held to float64 on a GPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

import tritonattn
from tests.kernels import harness
from tests.support.flash import assert_close
from tests.support.packed import Packed
from tritonattn.backends.flash import run
from tritonattn.backends.flash.libraries import Library

RIGHT, WRONG = "right", "WRONG"
# Sizes and options that differ from 300 queries and keys of 2 key heads and 4 query heads, head dim 64, and a gain.
_SQUARE = {"batch": 2, "kv_heads": 2, "q_len": 300, "k_len": 300, "head_dim": 64, "value_dim": 64}
DENSE = {
    "full": ({}, {}),
    "causal": ({}, {"causal": True}),
    "causal, fewer queries": ({"q_len": 130}, {"causal": True}),
    "causal, fewer keys": ({"k_len": 130}, {"causal": True}),
    "one query": ({"q_len": 1}, {"causal": True}),
    "window": ({}, {"window": (50, 20)}),
    "left window": ({"q_len": 130}, {"window": (50, None)}),
    "right window": ({}, {"window": (None, 20)}),
    "causal window, fewer keys": ({"k_len": 130}, {"causal": True, "window": (20, None)}),
    "key norms": ({}, {"causal": True, "scaling": "key_norm_rms"}),
    "a factor a key": ({}, {"causal": True, "scaling": "cosine"}),
    "a constant below 0": ({}, {"causal": True, "scaling": -0.1}),
    "softcap": ({}, {"causal": True, "softcap": 2.0}),
    "sinks": ({"scales": ("gain", "sinks")}, {"causal": True}),
    "as many key heads": ({"group": 1, "kv_heads": 4}, {"causal": True}),
    "head dim 40": ({"head_dim": 40, "value_dim": 24}, {"causal": True}),
    "head dim 128": ({"head_dim": 128, "value_dim": 128}, {"causal": True}),
    "head dim 192, values of 128": ({"head_dim": 192, "value_dim": 128}, {"causal": True}),
    "head dim 256": ({"head_dim": 256, "value_dim": 256}, {"causal": True}),
}
PACKED = {
    "packed": (Packed((130, 1, 0, 64), (130, 70, 5, 64), 3, 5), {"causal": True}),
    "packed window": (Packed((130, 40), (140, 200)), {"window": (30, 0)}),
    "packed rows of one": (Packed((1, 0, 1), (9, 4, 200), 1), {}),
}
_SLACK = 2.0  # the tests of the libraries allow up to three times PyTorch's error in gradients


def check(library: Library, device: torch.device, seconds: float = math.inf) -> list[list[str]]:
    """Rows of a table: a call, and `RIGHT`, why it is refused, `WRONG` and how, or that it came after those seconds."""
    dtype, end = torch.bfloat16, time.monotonic() + seconds
    calls: dict[str, Callable[[], None]] = {}
    for name, (sizes, options) in DENSE.items():
        calls[name] = lambda sizes=sizes, options=options: _dense(device, dtype, sizes, options)
    for name, (packed, options) in PACKED.items():
        calls[name] = lambda packed=packed, options=options: _packed(device, dtype, packed, options)
    calls["lse"] = lambda: _lse(device, dtype)
    with mock.patch.object(run, "libraries", return_value=(library,)):
        return [[library.name, name, _outcome(call, end)] for name, call in calls.items()]


def wrong(rows: list[list[str]]) -> list[str]:
    """The libraries with a wrong call."""
    return sorted({name for name, _, outcome in rows if outcome.startswith(WRONG)})


def _outcome(call: Callable[[], None], end: float) -> str:
    if time.monotonic() > end:
        return "not run: out of time"
    try:
        call()
    except NotImplementedError as error:
        return f"refused: {str(error).split(': backend')[0]}"
    except Exception as error:  # from a compiler or a driver too
        return f"{WRONG}: {type(error).__name__}: {error}".splitlines()[0]
    return RIGHT


def _dense(device: torch.device, dtype: torch.dtype, sizes: dict[str, Any], options: dict[str, Any]) -> None:
    tensors = harness.inputs(dtype, device, **{**_SQUARE, "scales": ("gain",), **sizes})
    _hold(tensors, tritonattn.attention, options)


def _packed(device: torch.device, dtype: torch.dtype, packed: Packed, options: dict[str, Any]) -> None:
    tensors = harness.packed_inputs(packed, dtype, device, kv_heads=2, head_dim=64, value_dim=64, scales=("gain",))
    _hold(tensors, tritonattn.attention_varlen, {**packed.arguments(device), **options})


def _hold(tensors: harness.Tensors, attend: Callable[..., Any], options: dict[str, Any]) -> None:
    assert_close(tensors, attend, summands=1.0, slack=_SLACK, **{"scaling": "log_key_count", **options})


def _lse(device: torch.device, dtype: torch.dtype) -> None:
    """Hold lse, also of rows without keys, in the layout of packed rows."""
    packed = Packed((130, 1, 9), (100, 70, 5), 3, 5)
    options = {**packed.arguments(device), "causal": True, "scaling": "log_key_count", "return_aux": True}
    tensors = harness.packed_inputs(packed, dtype, device, kv_heads=2, head_dim=64, value_dim=64)
    found, exact = (
        tritonattn.attention_varlen(**x, **options, backend=backend)[1].lse.double()
        for x, backend in ((tensors, "flash"), (harness.as_double(tensors), "reference"))
    )
    torch.testing.assert_close(found, exact, atol=0.05, rtol=0.01)
