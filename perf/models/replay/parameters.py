"""Parameters of the replay by architecture, each figure with its source.

[G]  CUDA C++ Programming Guide, arithmetic throughput by compute capability; by way of `perf.models.static.model.RATES`
[F]  FlashGPU-Sim's parameters for an H100, from microbenchmarks: configs/SM90_H100_SASS_FRONTEND and
     src/gpgpu-sim/flash/sass/PARAMETERS.md of github.com/FlashGPU-Sim/FlashGPU-Sim
[W]  NVIDIA A100 Tensor Core GPU Architecture, 2020: 5120 bytes per clock from L2 to 108 processors
[A]  assumed: nothing measured is known
[3]  fitted to published times of FlashAttention-3 on an H100 (perf/models/replay/published.json)
[=]  no source: the value of the nearest architecture that has one
"""

from __future__ import annotations

from dataclasses import dataclass

from ..static.model import RATES, Rates


@dataclass(frozen=True)
class Parameters:
    """One of a processor's four schedulers, its units, and its part of what all four share.

    Turns are clocks that one warp's instruction keeps a unit, latencies clocks until its result is there.

    exp_during_products   a turn of the exp unit takes this many times as long while wgmma runs
    barrier               clocks from the last warp's arrival to the first instruction behind a barrier
    poll, poll_release    clocks of a test of an mbarrier, and from its completion until a warp that waits goes on
    back_edge             clocks that the branch back to a loop's head adds
    l2_bytes              bytes per clock that reach a processor's shared memory
    queue_of_shared       wgmma that may wait to start, both operands in shared memory; queue_of_registers: the first in
                          registers. wgmma_start: clocks from issue to start. wgmma_tail: from the tensor
                          unit's last clock to a result that may be read
    operand               clocks that reading a register takes of its file, during_products: while wgmma runs;
                          operand_slack: clocks that it may be behind
    """

    rates: Rates
    multiply: float
    uniform: float
    uniform_latency: float
    constant_latency: float
    exp_latency: float
    exp_during_products: float
    shuffle: float
    shuffle_latency: float
    load_matrix: float
    store_matrix: float
    shared: float
    shared_latency: float
    asynchronous: float
    store_latency: float
    local_latency: float
    global_latency: float
    barrier: float
    poll: float
    poll_release: float
    back_edge: float
    copy_latency: float
    request_start: float
    request_latency: float
    l2_bytes: float
    queue_of_shared: int = 0
    queue_of_registers: int = 0
    wgmma_start: float = 0.0
    wgmma_tail: float = 0.0
    operand: float = 0.0
    operand_during_products: float = 0.0
    operand_slack: float = 0.0

    @property
    def fp32(self) -> float:
        return 128 / self.rates.fp32

    @property
    def integer(self) -> float:
        return 128 / self.rates.integer

    @property
    def exp(self) -> float:
        return 128 / self.rates.exp


def _of_ampere(arch: str) -> Parameters:
    """Parameters of an architecture without wgmma, TMA and mbarriers."""
    return Parameters(
        RATES[arch],
        multiply=2,  # [G] 64 lanes
        uniform=1,  # [A]
        uniform_latency=6,  # [=]
        constant_latency=12,  # [=]
        exp_latency=18,  # [=]
        exp_during_products=1,  # mma.sync holds the scheduler itself
        shuffle=4,  # [G] 32 lanes
        shuffle_latency=24,  # [=]
        load_matrix=16,  # [G] 512 bytes of a warp at 128 bytes per clock for four schedulers
        store_matrix=16,  # [G] likewise
        shared=16,  # [G] likewise
        shared_latency=29,  # [=]
        asynchronous=16,  # [G] likewise
        store_latency=30,  # [=]
        local_latency=39,  # [=]
        global_latency=300,  # [=]
        barrier=30,  # [=]
        poll=36,  # [=]
        poll_release=43,  # [=]
        back_edge=12,  # [=]
        copy_latency=400,  # [A] between L2's 200 and memory's 600
        request_start=32,  # [=]
        request_latency=435,  # [=]
        l2_bytes=5120 / 108,  # [W]; [=] for sm_86 and sm_89
    )


PARAMETERS = {
    "80": _of_ampere("80"),
    "86": _of_ampere("86"),
    "89": _of_ampere("89"),
    "90": Parameters(
        RATES["90"],
        multiply=2,  # [G] 64 lanes
        uniform=1,  # [A]
        uniform_latency=6,  # [A]
        constant_latency=12,  # [A]
        exp_latency=18,  # [F] 18.9 in a chain
        exp_during_products=1.5,  # [3]
        shuffle=4,  # [G] 32 lanes
        shuffle_latency=24,  # [A]
        load_matrix=4,  # [F]
        store_matrix=7,  # [F]
        shared=4,  # [F]
        shared_latency=29,  # [F]
        asynchronous=4,  # [A]
        store_latency=30,  # [A]
        local_latency=39,  # [A]
        global_latency=300,  # [A]
        barrier=30,  # [F]
        poll=36,  # [F]
        poll_release=43,  # [F]
        back_edge=12,  # [F]
        copy_latency=400,  # [A] between L2's 200 and memory's 600
        request_start=32,  # [F]
        request_latency=435,  # [F]
        l2_bytes=38.8,  # [F] 32 KiB by 128 programs at once take 1280 clocks
        queue_of_shared=6,  # [F]
        queue_of_registers=5,  # [F]
        wgmma_start=17,  # [F]
        wgmma_tail=65,  # [F]
        operand=0.5,  # [F] 1024 bytes per clock and processor
        operand_during_products=1.0,  # [F] of which results of wgmma take half
        operand_slack=3,  # [F]
    ),
}
