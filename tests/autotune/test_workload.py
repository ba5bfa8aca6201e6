"""The calls that a search times: their sizes and copies. No kernel runs."""

import pytest
import torch

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget

from tritonattn.autotune import workload
from tritonattn.autotune.workload import Workload, checked_size
from tritonattn.backends.triton import KERNELS, device, launch
from tritonattn.backends.triton.compile import launch_of, specialised
from tritonattn.core.call import ForwardResult
from tritonattn.tuning.calls import Size
from tritonattn.tuning.config import Target
from tritonattn.tuning.defaults import default_config
from tritonattn.tuning.table import Key, keys

CPU = torch.device("cpu")


@pytest.mark.skipif(launch.interpreting, reason="TRITON_INTERPRET=1 leaves nothing to compile")
@pytest.mark.parametrize("key", [key for key in keys() if key.head_dim in (64, 80)], ids=str)
def test_the_gate_compiles_the_launch_that_is_timed(key):
    """The same code, to the alignments of the arguments, on an H100."""
    size = Size(2, 32, 1, 1024, 4) if key.kernel == "decode" else Size(2, 2, 64, 64)
    target, gpu = Target("cuda", "90"), GPUTarget("cuda", 90, 32)
    timed = Workload(key.kernel, key.problem, size, CPU, copies=1)
    with launch.recording(target) as launches:
        timed(0)
    config = default_config(key.kernel, key.problem, target)
    gated, options = launch_of(key.kernel, key.problem, config, target), device.compile_options(config)
    [run] = [one for one in launches if one.kernel is KERNELS[key.kernel]]
    hashes = {specialised(one.kernel, one.arguments, options, gpu).hash() for one in (run, gated)}
    assert len(hashes) == 1


def test_a_check_keeps_the_group_and_the_share_of_each_field():
    """A check is as large as the reference can compute, and whole where the call is small."""
    small = Size(4, 16, 256, 256)
    assert checked_size(small) is small
    assert checked_size(Size(4, 32, 8192, 8192, group=8, left=100)) == Size(2, 16, 512, 512, group=8, left=100)
    assert checked_size(Size(512, 32, 1, 2**17, group=8, page=16)) == Size(2, 16, 1, 2**17, group=8, page=16)
    packed = checked_size(Size(16, 4, 4096, 4096, group=2, q_total=32768, k_total=32768))
    assert packed == Size(2, 4, 1024, 1024, group=2, q_total=1501, k_total=1501)
    assert checked_size(Size(1, 2**25, 1, 1, group=2**25)).logits == 2**25, "of heads that share a key nothing is cut"


def test_nan_is_wrong(monkeypatch):
    """As of rows that a config leaves out."""
    timed = Workload("forward", Key("forward", 64, "query+key", "short").problem, Size(1, 2, 8, 8), CPU, copies=1)
    right = timed._copies[0].reference(torch.bfloat16)[0]
    assert right.shape == (1, 2, 8, 64)
    for factor, message in ((1.0, None), (1.03, "expected an error of at most"), (torch.nan, "got nan")):
        monkeypatch.setattr(
            workload.triton_backend, "forward", lambda *_, x=right * factor: ForwardResult(x, x[..., 0])
        )
        found = timed.error()
        assert found is None if message is None else message in str(found)
