"""The model that ranks configs, against sums by hand and what has to hold for any kernel."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from perf.models.replay.exposed import Flight, bounded_clocks
from perf.models.replay.loops import HotLoop
from perf.models.replay.parameters import PARAMETERS
from perf.models.static.gate import Judged, Latency, modelled_clocks
from perf.models.static.machine_code import MachineCode, MmaLoop
from perf.models.static.model import RATES, Rates, cycles, turns, utilisation
from tritonattn.tuning.config import Problem, TileConfig
from tritonattn.tuning.gpus import GPUS

A100 = next(gpu for gpu in GPUS if gpu.name == "a100")
PROBLEM = Problem(64, 64, torch.bfloat16, right=True)
CONFIG = TileConfig(128, 64, 8, 2)
# On an A100 with 8 warps: tensor 1000 clocks, exp 800, integer 600, issue 600.
LOOP = MmaLoop({"tensor": 100, "exp": 50, "integer": 150}, packed=0, tiles=1, flops=2048 * 1000, shared_bytes=0)


def clocks(loop, config=CONFIG, kernel="forward", registers=128, short=False, latency=None):
    code = MachineCode(registers, 0, 49152, 0, 0, None if loop is None else (loop,))
    candidate = Judged(config, code, (), latency)
    return modelled_clocks(kernel, replace(PROBLEM, short=short), candidate, A100)


def test_clocks_of_every_unit():
    mix = {"tensor": 2, "exp": 3, "fp32": 4, "multiply": 5, "compare": 6, "convert": 7, "integer": 8}
    rates = Rates("card", tensor=1024, fp32=64, shared_memory=0, warps=64, programs=32)
    bounds = cycles(MmaLoop(mix, packed=1, tiles=1, flops=8192, shared_bytes=1280), rates, warps=4)
    assert bounds == {"tensor": 8, "exp": 24, "fp32": 20, "integer": 42, "issue": 35, "shared": 10}
    assert utilisation(bounds, 4096, rates) == pytest.approx(4 / 42)


def test_clocks_of_a_call():
    """8,192 programs, 2 to a processor: 38 waves of 128 iterations, of whose other units 4 warps a scheduler hide."""
    assert clocks(LOOP) == pytest.approx(38 * 2 * 128 * (1000 + (800 + 600) / 4))
    alone = replace(CONFIG, num_stages=1)
    loads = 600 + 64 * 128 * 2 / 48  # latency, and the bytes of 64 keys and values at the rate of L2
    assert clocks(LOOP, alone) == pytest.approx(38 * 2 * 128 * (1000 + (800 + 600) / 4 + loads / 2))
    late = replace(CONFIG, descriptors=True)
    assert clocks(LOOP, late) == clocks(LOOP, alone), "the TMA is asked at the end of an iteration, for the next"
    assert clocks(LOOP, replace(late, num_stages=3)) == clocks(LOOP)
    replayed = Latency(0.5, 1500.0, 2, awaits_last=False)
    assert clocks(LOOP, latency=replayed) == 38 * 128 * 1500, "of a program while another runs"
    stores = replace(LOOP, shared_bytes=5000 * 128)
    assert clocks(stores) == pytest.approx(38 * 2 * 128 * 5000)


def test_products_and_the_rest_take_turns_where_all_warps_wait():
    """Of an iteration: 1,000 clocks of products, 800 of exponentials, and 300 of the rest in shared memory."""
    loop = replace(LOOP, shared_bytes=700 * 128, operand_bytes=400 * 128)
    rates = RATES["80"]
    assert turns(loop, rates, warps=8) == (1000, 800)
    assert turns(replace(loop, shared_bytes=2200 * 128, operand_bytes=1200 * 128), rates, warps=8) == (1200, 1000)
    assert clocks(loop) == pytest.approx(38 * 2 * 128 * (1000 + 800 / 2)), "2 programs, of which each hides one half"
    assert clocks(loop, registers=255) == pytest.approx(76 * 128 * (1000 + 800)), "a program alone"


@pytest.mark.parametrize("programs", [1, 2])
def test_bounds_with_and_without_overlap(programs):
    rates, parameters = RATES["80"], PARAMETERS["80"]
    in_turn = replace(LOOP, operand_bytes=128)
    for loop, clocks in ((LOOP, programs * 1000), (in_turn, max(programs * 1000, 1800))):
        hot = HotLoop([], {}, loop, 0, 0)
        found = bounded_clocks(hot, [], Flight(1, 0.25, None), parameters, rates, 8, programs)
        exposed = parameters.copy_latency - 0.25 * clocks
        least = parameters.copy_latency - 0.25 * programs * 1000
        assert found == (clocks + max(0, exposed), max(0, exposed), programs * 1000 + max(0, least))
