"""Run the compiled kernels on a CPU, in real bf16 and fp16: `python -m tests.emulate EMULATOR.py`.

EMULATOR.py is a module that executes PTX. It has compile_for(kernel, args, meta, num_warps, num_stages, capability) ->
(compiled, arguments, names) and run(compiled, grid, arguments, arg_names=...) -> report with `ok`, raises at an access
out of bounds, and lists races and uninitialised reads. Inputs lie in padded allocations, so that a row's overrun shows.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import torch

import tritonattn
from tests.kernels import harness
from tests.support.masks import MASKS
from tritonattn import launch
from tritonattn.tuning.config import TILED_KERNELS, TileConfig

DTYPES = (torch.bfloat16, torch.float16)
SCALES = ((), ("query_scale",), ("query_scale", "key_scale"))
# head_dim, value_dim, and the tiles to run them with; None is the default config.
SIZES = ((16, 16, TileConfig(16, 16, 1, 2)), (40, 24, TileConfig(32, 16, 2, 1)), (64, 64, None), (128, 128, None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("emulator", type=Path, help="path of the emulator's module")
    parser.add_argument("--capability", type=int, default=80, help="compute capability to compile for, as in sm_80")
    parser.add_argument("--quick", action="store_true", help="one mask a size")
    options = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    emulator = _load(options.emulator)
    launches = _install(emulator, options.capability)
    started = time.monotonic()
    cases = 0
    for (head_dim, value_dim, tiles), dtype in itertools.product(SIZES, DTYPES):
        launch.config_for = _configs(tiles, options.capability)
        for mask, scales in itertools.islice(itertools.product(MASKS, SCALES), 1 if options.quick else None):
            _check(dtype, head_dim, value_dim, mask, scales)
            cases += 1
        print(f"{dtype} D {head_dim} Dv {value_dim}: clean, {len(launches)} launches so far", flush=True)
    for mode in tritonattn.SCALINGS:
        _check_mode(mode)
        cases += 1
    print(f"sm_{options.capability}: {cases} cases, {len(launches)} launches, no fault, race or uninitialised read, "
          f"all within the bound; {time.monotonic() - started:.0f} s")  # fmt: skip


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _install(emulator: ModuleType, capability: int) -> list[str]:
    launches = []

    def run(kernel, grid, arguments, config):
        compiled, values, names = emulator.compile_for(
            kernel, (), arguments, config.num_warps, config.num_stages, capability
        )  # fmt: skip
        report = emulator.run(compiled, grid, values, arg_names=[*names, *["scratch"] * 8])
        if not report.ok:
            raise SystemExit(f"{compiled.metadata.name}: {report}")
        launches.append(compiled.metadata.name)

    launch.run = run
    return launches


def _configs(tiles: TileConfig | None, capability: int):
    target = launch.Target("cuda", str(capability))

    def config(kernel, problem, _):
        return tiles if tiles and kernel in TILED_KERNELS else launch.default_config(kernel, problem, target)

    return config


def _check(dtype: torch.dtype, head_dim: int, value_dim: int, mask: str, scales: tuple[str, ...]) -> None:
    tensors = harness.inputs(dtype, torch.device("cpu"), head_dim=head_dim, value_dim=value_dim, scales=scales)
    padded = {name: _padded(tensor) for name, tensor in tensors.items()}
    harness.check(padded, scale=head_dim**-0.5, **MASKS[mask](2, 2, 37, 53))


def _check_mode(mode: str) -> None:
    tensors = harness.inputs(torch.bfloat16, torch.device("cpu"), q_len=40, k_len=40)
    harness.check(tensors, lambda **arguments: tritonattn.attention(scaling=mode, **arguments), causal=True)


def _padded(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with a gap after the rows of every head."""
    if tensor.dim() < 4:
        return tensor
    return torch.nn.functional.pad(tensor, (0, 0, 0, 2))[:, :, : tensor.shape[2]]


if __name__ == "__main__":
    main()
