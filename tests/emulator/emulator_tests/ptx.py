"""PTX modules of a few instructions, and single instructions applied to many values."""

from __future__ import annotations

import numpy as np
import torch
from ptx_emulator import Report, run_ptx

_REGISTERS = {"pred": "%p", "b16": "%h", "b32": "%r", "b64": "%rd"}
_DTYPES = {"b16": torch.int16, "b32": torch.int32, "b64": torch.int64}
_SIZES = {"b16": 2, "b32": 4, "b64": 8}
THREADS = 32


def module(
    body: str, pointers: int = 1, threads: int = THREADS, shared: bool = True, most_registers: int | None = None
) -> str:
    """A kernel with the pointers in %rd1, %rd2, ..., the thread in %r0, shared memory at 0, and `body`."""
    limit = "" if most_registers is None else f".maxnreg {most_registers}"
    parameters = ",\n".join(f".param .u64 .ptr .global .align 16 p{i + 1}" for i in range(pointers))
    loads = "\n".join(f"ld.param.u64 %rd{i + 1}, [p{i + 1}];" for i in range(pointers))
    registers = "\n".join(f".reg .{type_name} {name}<200>;" for type_name, name in _REGISTERS.items())
    smem = ".extern .shared .align 128 .b8 smem[];" if shared else ""
    return f"""
.version 8.6
.target sm_90a
.address_size 64
{smem}
.visible .entry kernel(
{parameters}
)
.reqntid {threads}
{limit}
{{
{registers}
{loads}
mov.u32 %r0, %tid.x;
{body}
ret;
}}
"""


def execute(
    body: str,
    *tensors: torch.Tensor,
    threads: int = THREADS,
    grid=1,
    shared: int = 4096,
    pointers: int | None = None,
    collect: bool = False,
    most_registers: int | None = None,
    **options,
) -> Report:
    text = module(body, len(tensors) if pointers is None else pointers, threads, most_registers=most_registers)
    return run_ptx(text, grid, tensors, num_warps=threads // 32, shared=shared, collect=collect, **options)


def apply(instruction: str, result: str, *operands: tuple[str, list[int]]) -> list[int]:
    """Raw unsigned results of "add.s32 {d}, {a}, {b};" on raw operands, each ("b32", values), value by value."""
    count = max(len(values) for _, values in operands)
    threads = -(-count // 32) * 32
    arrays = [_array(type_name, values, threads) for type_name, values in operands]
    names, lines = {}, []
    for i, (type_name, _) in enumerate(operands):
        register = names["abc"[i]] = f"{_REGISTERS[type_name]}{100 + i}"
        lines.append(f"mad.wide.u32 %rd50, %r0, {_SIZES[type_name]}, %rd{i + 1};")
        lines.append(f"ld.global.{type_name} {register}, [%rd50];")
    stored = "b32" if result == "pred" else result
    names["d"] = f"{_REGISTERS[result]}150"
    lines.append(instruction.format(**names))
    if result == "pred":
        lines.append("selp.b32 %r150, 1, 0, %p150;")
    lines += [
        f"mad.wide.u32 %rd50, %r0, {_SIZES[stored]}, %rd{len(operands) + 1};",
        f"st.global.{stored} [%rd50], {_REGISTERS[stored]}150;",
    ]
    out = torch.zeros(threads, dtype=_DTYPES[stored])
    report = execute("\n".join(lines), *arrays, out, threads=threads)
    assert report.ok, str(report)
    return out.numpy().view(f"u{_SIZES[stored]}")[:count].tolist()


def _array(type_name: str, values: list[int], length: int) -> torch.Tensor:
    size = _SIZES[type_name]
    raw = np.array([value & ((1 << 8 * size) - 1) for value in values], dtype=f"u{size}")
    return torch.from_numpy(np.resize(raw, length).view(f"i{size}").copy())


def signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value
