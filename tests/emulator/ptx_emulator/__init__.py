"""An emulator of PTX: run what Triton compiles for NVIDIA sm_80 to sm_90 on a CPU, every memory access checked.

    report = compile.launch(kernel, grid, *arguments, num_warps=4, num_stages=2, capability=90, BLOCK=64)
    report = run(compiled, grid, arguments)          # Triton's CompiledKernel
    report = run_ptx(text, grid, arguments, num_warps=4, shared=0)
    assert report.ok, report

It runs the compiled kernel, not its source: layouts, shared memory, pipelines, matrix and asynchronous instructions,
real bf16. README.md next to this folder says what a clean report proves, and what it does not.

Each basic block becomes one Python function on numpy arrays with one element per thread; several CTAs run at once.
`arithmetic_code` and `memory_code` translate instructions, `machine` holds the state, `scheduler` picks the next block.
Where warps are specialised, `partitions` picks it, in any of several orders, and `vector_clocks` knows which accesses
are ordered by mbarriers and named barriers: a missing edge shows in every order.
"""

from .errors import PTXError, PTXFault
from .execute import run, run_ptx
from .report import Report

__all__ = ["PTXError", "PTXFault", "Report", "run", "run_ptx"]
