"""The emulated kernels in their default configs: pairs of choices, every head dim, every synchronisation."""

import pytest
import torch

from tests.emulated import test_attention as attention
from tests.emulated import test_decode as decode
from tests.emulated import test_hopper as hopper
from tests.emulated import test_key_statistics as key_statistics
from tests.emulated import test_synchronisation as synchronisation
from tests.emulated import test_varlen as varlen
from tests.emulated.executor import GPU
from tests.support.pairs import in_turn
from tests.support.versions import OLDER_TRITON


# The longest come first: they are not left for the end, when one worker has nothing to do.
@pytest.mark.parametrize("gpu", [GPU(80), GPU(90, descriptors=True)], ids=str)
def test_no_synchronisation_can_be_left_out(gpu, emulate):
    """Every one of sm_80's kernels and of the forward of sm_90; one of each operation of its other kernels."""
    recorder = emulate(gpu, executor=synchronisation.Recorder)
    for kernel, launches in synchronisation.launches_of(recorder).items():
        each = gpu.capability == 80 or kernel == "attention_forward"
        missed = synchronisation.check(launches, each)
        for operation, least in synchronisation.least(gpu).items():
            count = least if each else 1
            assert missed[operation] >= count, (
                f"{kernel}, {operation}: expected at least {count} to be missed, got {missed[operation]}"
            )


@pytest.mark.skipif(OLDER_TRITON, reason="older compilers leave out fences")
def test_no_synchronisation_of_hopper_can_be_left_out(emulate):
    found, implied = hopper.missed(hopper.check(hopper.CALL, emulate).launches[0])
    assert implied == {instruction: count for instruction, (count, _) in hopper.IMPLIED.items()}
    assert found["mbarrier.try_wait"] >= 10
    assert found["mbarrier.arrive"] >= 15


@pytest.mark.parametrize(("gpu", "case"), attention.EVERYTHING, ids=str)
def test_attention(gpu, case, emulate):
    executor = emulate(gpu)
    case.check()
    if gpu.descriptors and case.mask == "full" and case.lengths[1] >= 130:
        assert executor.executed("tma") > 0


@pytest.mark.parametrize(("gpu", "case"), decode.EVERYTHING, ids=str)
def test_decode(gpu, case, emulate):
    executor = emulate(gpu)
    case.check()
    assert "combine_splits" in executor.launched or case.window == (90, 0)


@pytest.mark.parametrize(("gpu", "case"), varlen.EVERYTHING, ids=str)
def test_varlen(gpu, case, emulate):
    executor = emulate(gpu)
    case.check()
    if gpu.descriptors and case.mask == "full":
        assert executor.executed("tma") > 0


@in_turn(
    head_dim=[16, 80, 256],
    dtype=[torch.float16, torch.bfloat16, torch.float32],
    gpu=[GPU(80), GPU(90)],
)
def test_head_dims_of_key_statistics(head_dim, dtype, gpu, emulate):
    emulate(gpu)
    for k_len, some_unseen in ((150, False), (37, True)):
        key_statistics.check(dtype, head_dim, k_len, some_unseen)


@pytest.mark.parametrize("case", [*hopper.EVERYTHING, *hopper.OF_PACKED], ids=str)
def test_hopper(case, emulate):
    hopper.check(case, emulate, orders=hopper.InOneOrder)


def test_gradients_behind_hopper(emulate):
    """The backward takes what the forward kept of its output's rounding."""
    case = hopper.Case(torch.float16, (64, 64), mask="lengths", scales=hopper.QUERY)
    hopper.check(case, emulate, gradients=True, orders=hopper.InOneOrder)
