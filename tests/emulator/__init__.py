"""An emulator of PTX: run what Triton compiles for NVIDIA sm_80 to sm_90 on a CPU, every memory access checked.

    report = compile.launch(kernel, grid, *arguments, num_warps=4, num_stages=2, capability=90, BLOCK=64)
    report = run(compiled, grid, arguments)          # Triton's CompiledKernel
    report = run_ptx(text, grid, arguments, num_warps=4, shared=0)
    assert report.ok, report

It runs the compiled kernel, not its source: layouts, swizzled shared memory, cp.async pipelines, ldmatrix, mma.sync,
wgmma, tensor descriptors (TMA), mbarriers, partitions of specialised warps with named barriers and registers that they
hand over, real bf16. Clusters and tcgen05 are not supported; an unsupported instruction raises PTXError when it is
executed.

Checked, from the order that the program demands and not from the timing of one run:

- every access is aligned, inside an element of a tensor argument (gaps of views do not count) or inside shared memory;
- shared memory and registers are written before they are read;
- two warps touch a byte of shared memory, one of them writing, only with a barrier between; two CTAs touch a byte of
  global memory, one of them writing, only by atomics;
- nobody touches what a cp.async or bulk copy writes before it has waited for it, nor what a wgmma or a bulk store
  reads, nor the registers of a wgmma, before the wait for its group;
- mbarriers: initialised, no more arrivals than expected, no copy left in flight;
- a wait that never ends, for an mbarrier, a named barrier or registers, is a deadlock, reported with its places;
- tensor maps: alignment, box, rank; proxy fences between generic writes and the asynchronous engine.

A clean run does not prove: anything about ptxas or the hardware, other inputs, the order of lanes inside a warp,
that an access in bounds is to the right element (pad allocations), proxy fences on the wrong side of a barrier, memory
order between CTAs. Results are PTX's to float32 rounding: sums of one mma are in BLAS order, ex2 and the like are as
exact as numpy's.

How: each basic block becomes one Python function on numpy arrays with one element per thread; several CTAs run at once.
`arithmetic_code` and `memory_code` translate instructions, `machine` holds the state, `scheduler` picks the next block.
Where warps are specialised, `partitions` picks it, in any of several orders, and `vector_clocks` knows which accesses
are ordered by mbarriers and named barriers: a missing edge shows in every order.
"""

from .errors import PTXError, PTXFault
from .execute import run, run_ptx
from .report import Report

__all__ = ["PTXError", "PTXFault", "Report", "run", "run_ptx"]
