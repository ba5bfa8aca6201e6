"""Barriers, fences, commits and waits of the compiled kernels are taken out in turn, and the emulator misses them.

One of each operation of a small forward pass here, every one of all default kernels in the slow test.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from ptx_emulator.parse import parse
from ptx_emulator.synchronisation import Order, left_out, operation_of

import tritonattn
from tests.support.versions import OLDER_TRITON
from tritonattn.tuning import TileConfig

from .cases import with_padded_gradient
from .executor import GPU, padded
from .recorder import Launch, Recorder

# Reasons that only a run shows, not the text; the emulator found each of them for all the calls below.
OBSERVED = {
    "bar.sync": "other barriers stand between those who touch the same bytes: Triton parts whole buffers, and so also "
    "slots of a ring that do not overlap",
    "cp.async.wait_group": "what is under way is copied past the last block, to where nobody looks",
    "mbarrier.inval": "nothing uses its memory again",
}
# How many of each operation must be missed: of every kernel, of those of sm_90, of those that copy in bulk.
LEAST = {"bar.sync": 5, "cp.async.commit_group": 2, "cp.async.wait_group": 2}
LEAST_OF_SM_90 = {"fence.proxy": 2, "wgmma.fence": 4, "wgmma.commit_group": 4, "wgmma.wait_group": 3}
LEAST_OF_DESCRIPTORS = {"mbarrier.init": 2, "mbarrier.arrive": 2, "mbarrier.try_wait": 1}


def attend(lengths: tuple[int, int], *, negative: bool, gradients: bool = True) -> None:
    """A causal call, and its gradients: two heads share the keys, and scales may be negative."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v = (
        padded(normal(1, heads, length, 64).bfloat16()).requires_grad_(gradients)
        for heads, length in ((2, lengths[0]), (1, lengths[1]), (1, lengths[1]))
    )
    scale = normal(1, 2, lengths[0])
    scale = padded(scale if negative else scale.abs(), (0, 3)).requires_grad_(gradients)
    call = with_padded_gradient(tritonattn.scaled_attention)
    out = call(q, k, v, query_scale=scale, causal=True, backend="triton")
    if gradients:
        out.backward(normal(*out.shape).bfloat16())


def launches_of(recorder: Recorder) -> dict[str, list[Launch]]:
    """By kernel, launches of the same code for two lengths and signs of scales."""
    attend((70, 560), negative=True)
    attend((330, 330), negative=False)
    found = {}
    for kernel in ("attention_forward", "attention_grad_query", "attention_grad_key_value"):
        found[kernel] = [one for one in recorder.launches if one.name == kernel]
        assert len({one.ptx for one in found[kernel]}) == 1 < len(found[kernel])
    return found


def check(launches: list[Launch], each: bool = True) -> Counter:
    """How many of each operation are missed, or of each operation the first; the others have a reason not to be."""
    ptx = launches[0].ptx
    kernel, order, missed = parse(ptx), Order(ptx), Counter()
    executed = set().union(*(launch.executed() for launch in launches))
    for one in kernel.instructions:
        operation = operation_of(one)
        if operation is None or (missed[operation] and not each):
            continue
        assert one.index in executed, f"expected a call that executes\n  {kernel.where(one)}"
        reason = order.why_needless(one)
        tried = launches[:1] if reason else launches  # one run confirms a reason
        if all(launch.is_clean(left_out(kernel, one)) for launch in tried):
            assert reason or operation in OBSERVED, f"expected a report without this instruction\n  {kernel.where(one)}"
        else:
            missed[operation] += 1
    return missed


def least(gpu: GPU) -> dict[str, int]:
    return LEAST | (LEAST_OF_SM_90 if gpu.capability == 90 else {}) | (LEAST_OF_DESCRIPTORS if gpu.descriptors else {})


@pytest.mark.skipif(OLDER_TRITON, reason="older compilers leave out fences")
def test_one_of_each_operation_is_missed(emulate):
    gpu = GPU(90, descriptors=True)
    recorder = emulate(gpu, TileConfig(64, 16, 4, 2), executor=Recorder)
    attend((70, 150), negative=True, gradients=False)
    assert check(recorder.launches, each=False).keys() >= least(gpu).keys()
