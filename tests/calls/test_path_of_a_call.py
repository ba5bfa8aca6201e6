"""The length of the way from a public function to its loop: files, functions and Python calls of warm calls.

Every frame of the package counts, down to the executor that a launch is handed to. `python -m
tests.calls.test_path_of_a_call` prints the table.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import tritonattn
from tritonattn.backends.triton import launch

PACKAGE = str(Path(tritonattn.__file__).parent) + os.sep
# At most so many files, functions and calls.
MOST = {
    "CPU, sqrt_dim": (10, 26, 29),
    "CPU, key_norm_mean, with backward": (12, 59, 71),
    "kernels, sqrt_dim": (17, 43, 45),
    "kernels, key_norm_mean, with backward": (22, 102, 164),
    "kernels, decode over pages, key_count": (20, 68, 80),
}


def calls() -> dict[str, Callable[[], object]]:
    """By name: causal attention of [1, 4, 64, 32], and decoding of 2 sequences over pages of 16 keys."""
    operands = torch.randn(3, 1, 4, 64, 32).unbind()
    leaves = [x.clone().requires_grad_() for x in operands]
    pages, table = torch.randn(8, 16, 4, 32), torch.arange(8, dtype=torch.int32).view(2, 4)
    q, lengths = torch.randn(2, 4, 1, 32), torch.tensor([40, 64])

    def forward(backend: str) -> object:
        return tritonattn.attention(*operands, causal=True, backend=backend)

    def with_backward(backend: str) -> object:
        out = tritonattn.attention(*leaves, scaling="key_norm_mean", causal=True, backend=backend)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    def decode() -> object:
        over = {"key_lengths": lengths, "block_table": table, "scaling": "key_count"}
        return tritonattn.attention_decode(q, pages, pages, **over, backend="triton")

    found = (
        lambda: forward("auto"),
        lambda: with_backward("auto"),
        lambda: forward("triton"),
        lambda: with_backward("triton"),
        decode,
    )
    return dict(zip(MOST, found, strict=True))


def path_of(call: Callable[[], object]) -> list[str]:
    """The functions of the package that a warm call enters, as "file: function", once for each time."""
    entered: list[str] = []

    def watch(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            entered.append(f"{code.co_filename.removeprefix(PACKAGE)}: {code.co_name} {code.co_firstlineno}")

    for _ in range(3):
        call()
    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(before)
    return entered


def lengths_of(path: list[str]) -> tuple[int, int, int]:
    """Files, functions and calls."""
    return len({name.partition(":")[0] for name in path}), len(set(path)), len(path)


@pytest.fixture(autouse=True)
def _no_kernel_runs(monkeypatch):
    monkeypatch.setattr(launch, "run", lambda *_: None)


@pytest.mark.parametrize("name", MOST)
def test_the_way_to_the_loop_is_short(name):
    path = path_of(calls()[name])
    found, most = lengths_of(path), MOST[name]
    assert all(one <= limit for one, limit in zip(found, most, strict=True)), (found, most, path)


if __name__ == "__main__":
    launch.run = lambda *_: None
    for name, call in calls().items():
        path = path_of(call)
        print(name, *lengths_of(path))
        if "--paths" in sys.argv:
            print(*(f"    {entry}" for entry in path), sep="\n")
