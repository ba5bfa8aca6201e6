"""Compile @triton.jit functions for a GPU that is not there, specialised as a launch would specialise them."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import mangle_type

from .execute import DEFAULT_MAX_THREADS, run
from .report import Report

_DIVISIBLE = [["tt.divisibility", 16]]
_compiled: dict[tuple, CompiledKernel] = {}


class Compiled(NamedTuple):
    """A kernel, the arguments that it takes at run time, and their names."""

    kernel: CompiledKernel
    arguments: list
    names: list[str]


def compile_for(function, values: dict[str, Any], *, num_warps: int, num_stages: int, capability: int) -> Compiled:
    """Compile for arguments by name (constexprs included) and a compute capability such as 80 or 90.

    As in a launch, the integer 1 becomes a constant, multiples of 16 (of a tensor: its address) are marked divisible,
    unless the function says `do_not_specialize`. Kept per specialisation for the life of the process.
    """
    signature, constants, attributes, arguments, names = {}, {}, {}, [], []
    for position, parameter in enumerate(function.params):
        name = parameter.name
        value = _value(function, name, values)
        kind = _type(parameter, value)
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = value
            continue
        if _is_divisible(parameter, value):
            attributes[position,] = _DIVISIBLE
        arguments.append(value)
        names += [name] * (1 + 2 * len(value.shape) if kind.startswith("tensordesc") else 1)
    key = (function, str(signature), str(constants), str(attributes), num_warps, num_stages, capability)
    if key not in _compiled:
        _compiled[key] = triton.compile(
            ASTSource(function, signature, constants, attributes),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True},
        )
    return Compiled(_compiled[key], arguments, names)


def launch(
    function, grid, *arguments, capability: int = 80, num_warps: int = 4, num_stages: int = 2, collect: bool = False,
    max_threads: int = DEFAULT_MAX_THREADS, **constexprs,
) -> Report:  # fmt: skip
    """kernel[grid](*arguments, **constexprs), run here: `launch(add, (4,), x, y, n, BLOCK=128)`."""
    names = [parameter.name for parameter in function.params if parameter.name not in constexprs]
    values = dict(zip(names, arguments, strict=False)) | constexprs
    compiled = compile_for(function, values, num_warps=num_warps, num_stages=num_stages, capability=capability)
    return run(
        compiled.kernel, grid, compiled.arguments, names=compiled.names, collect=collect, max_threads=max_threads
    )  # fmt: skip


def _value(function, name: str, values: dict[str, Any]):
    if name in values:
        return values[name]
    default = inspect.signature(function.fn).parameters[name].default
    if default is inspect.Parameter.empty:
        raise TypeError(f"{function.__name__}: expected a value for {name}, got none")
    return getattr(default, "value", default)


def _type(parameter, value) -> str:
    """Triton's name of the type of an argument: "constexpr", "*bf16", "i32", "tensordesc<bf16[16, 64]>", ..."""
    constant_one = type(value) is int and value == 1 and not parameter.do_not_specialize
    return "constexpr" if parameter.is_constexpr or constant_one else mangle_type(value)


def _is_divisible(parameter, value) -> bool:
    if parameter.do_not_specialize or parameter.do_not_specialize_on_alignment:
        return False
    if isinstance(value, torch.Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return type(value) is int and value % 16 == 0
