"""The machine code of compiled kernels, read once in a process."""

import functools

from perf.models.static.machine_code import MachineCode, read_machine_code
from tritonattn.tuning import Problem, Target, TileConfig, compile_kernel, default_config


@functools.cache
def facts(kernel: str, problem: Problem, target: str, config: TileConfig | None = None) -> MachineCode:
    """Compile a kernel, in its default config unless another is given, and read its code."""
    config = default_config(kernel, problem, Target.parse(target)) if config is None else config
    return read_machine_code(compile_kernel(kernel, problem, config, target))
