"""The calls that a search times: their sizes and copies. No kernel runs."""

import pytest
import torch

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget

from tritonattn.backends.triton import device, launch
from tritonattn.backends.triton.compile import launch_of, specialised
from tritonattn.core.call import ForwardResult
from tritonattn.kernels import KERNELS
from tritonattn.tuner import workload
from tritonattn.tuner.static import keys
from tritonattn.tuner.workload import Size, Workload, typical_size
from tritonattn.tuning.config import Target, is_short
from tritonattn.tuning.defaults import default_config
from tritonattn.tuning.table import Key

CPU = torch.device("cpu")


def test_a_typical_call_is_of_its_key():
    """Short or long; of decoding one whose packed rows a table serves, as those of a group are."""
    for key in keys():
        size = typical_size(key)
        assert is_short(size.length, size.length) == (key.lengths == "short")
        assert size.batch * size.length == (2**18 if key.kernel == "decode" else 2**14)
        assert size.group == (4 if key.kernel == "decode" else 1)
        assert size.heads % size.group == 0
    assert typical_size(key, length=2**20).batch == 1


@pytest.mark.skipif(launch.interpreting, reason="TRITON_INTERPRET=1 leaves nothing to compile")
@pytest.mark.parametrize("key", [key for key in keys() if key.head_dim in (64, 80)], ids=str)
def test_the_gate_compiles_the_launch_that_is_timed(key):
    """The same code, to the alignments of the arguments."""
    target, gpu = Target("cuda", "90"), GPUTarget("cuda", 90, 32)
    size = Size(2, 32, 1024, 4) if key.kernel == "decode" else Size(2, 2, 64)
    timed = Workload(key, size, torch.bfloat16, CPU, copies=1)
    with launch.recording(target) as launches:
        timed(0)
    config = default_config(key.kernel, key.problem, target)
    gated, options = launch_of(key.kernel, key.problem, config, target), device.compile_options(config)
    [run] = [one for one in launches if one.kernel is KERNELS[key.kernel]]
    sources = [specialised(one.kernel, one.arguments, options, gpu).hash() for one in (run, gated)]
    assert sources[0] == sources[1]


@pytest.mark.parametrize("kernel", ["forward", "decode"])
def test_rounds_take_copies_in_turn(kernel, monkeypatch):
    calls = []

    def launched(call, aux, rounding=None):
        calls.append(call.q)
        return ForwardResult(call.q, call.q[..., 0])

    monkeypatch.setattr(workload.triton_backend, kernel, launched)
    timed = Workload(Key(kernel, 64, "none", "short"), Size(1, 2, 8), torch.bfloat16, CPU, copies=2)
    for number in (0, 1, 2, 5):
        timed(number)
    first, second, *others = calls
    assert [x is first for x in others] == [True, False]
    assert others[1] is second
    assert first.data_ptr() != second.data_ptr()
    assert not torch.equal(first, second)


def test_nan_is_wrong(monkeypatch):
    """As of rows that a config leaves out."""
    timed = Workload(Key("forward", 64, "query+key", "short"), Size(1, 2, 8), torch.float16, CPU, copies=1)
    right = timed._reference(torch.float16, slice(None))[0]
    assert right.shape == (1, 2, 8, 64)
    for factor, message in ((1.0, None), (1.004, "expected an error of at most"), (torch.nan, "got nan")):
        monkeypatch.setattr(
            workload.triton_backend, "forward", lambda *_, x=right * factor: ForwardResult(x, x[..., 0])
        )
        found = timed.error()
        assert found is None if message is None else message in str(found)


def test_poison_is_in_new_memory_alone(monkeypatch):
    """And torch is left as it was, also by a config that raises."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    before, kept = torch.get_deterministic_debug_mode(), torch.ones(3)

    def fail():
        with workload._poisoned_memory():
            assert torch.empty(2**16).isnan().all()
            assert kept.sum() == 3
            raise RuntimeError("out of resource")

    with pytest.raises(RuntimeError, match="out of resource"):
        fail()
    assert torch.get_deterministic_debug_mode() == before
    assert not torch.utils.deterministic.fill_uninitialized_memory
