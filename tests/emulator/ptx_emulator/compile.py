"""Compile @triton.jit functions for a GPU that is not there, specialised as a launch would specialise them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature, find_paths_if, get_iterable_path

from .execute import DEFAULT_MAX_THREADS, run
from .report import Report

_compiled: dict[tuple, CompiledKernel] = {}


class Argument(NamedTuple):
    """An argument, or a record's field, that a kernel takes at run time; type: Triton's name of its type."""

    name: str
    value: Any
    type: str


class Compiled(NamedTuple):
    """A kernel, the arguments that it takes at run time, and their names."""

    kernel: CompiledKernel
    arguments: list
    names: list[str]


def compile_for(function, values: dict[str, Any], *, num_warps: int, num_stages: int, capability: int) -> Compiled:
    """Compile for arguments by name (constexprs included) and a compute capability such as 80 or 90.

    Kept per specialisation for the life of the process.
    """
    values = {parameter.name: _value(function, parameter.name, values) for parameter in function.params}
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    target = GPUTarget("cuda", capability, 32)
    source = specialised(function, values, options, target)
    key = (source.hash(), num_warps, num_stages, capability)
    if key not in _compiled:
        _compiled[key] = triton.compile(source, target=target, options=options)
    arguments, names = [], []
    for name, argument, type_name in at_run_time(source.signature, values):
        arguments.append(argument)
        names += [name] * (1 + 2 * len(argument.shape) if type_name.startswith("tensordesc") else 1)
    return Compiled(_compiled[key], arguments, names)


def specialised(function, values: dict[str, Any], options: dict[str, Any], target: GPUTarget) -> ASTSource:
    """The source that `JITFunction.run` compiles for these values, with its types, constants and alignments."""
    backend = make_backend(target)
    bind = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, unbound = bind(**values, **options)
    if hasattr(function, "_pack_args"):
        _, types, constants, attributes = function._pack_args(backend, options, bound, specialization, unbound)
        return ASTSource(function, types, constants, attributes)
    types, notes = (list(column) for column in zip(*specialization, strict=True))  # triton 3.4
    given = list(bound.values())
    constants = {path: get_iterable_path(given, path) for path in find_paths_if(types, lambda _, x: x == "constexpr")}
    noted = find_paths_if(notes, lambda _, note: isinstance(note, str))
    attributes = {path: backend.parse_attr(get_iterable_path(notes, path)) for path in noted}
    return ASTSource(function, dict(zip(bound, types, strict=True)), constants, attributes)


def at_run_time(signature: dict[str, Any], values: dict[str, Any]) -> Iterator[Argument]:
    """The arguments that a kernel of this signature takes at run time: no constants, and the fields of records."""
    for name, declared in signature.items():
        yield from _of_value(name, values[name], declared)


def _of_value(name: str, value: Any, declared: Any) -> Iterator[Argument]:
    if isinstance(declared, tuple):
        fields = getattr(value, "_fields", range(len(value)))
        for field, part, its_type in zip(fields, value, declared, strict=True):
            yield from _of_value(f"{name}.{field}", part, its_type)
    elif declared != "constexpr":
        yield Argument(name, value, declared)


def launch(
    function,
    grid,
    *arguments,
    capability: int = 80,
    num_warps: int = 4,
    num_stages: int = 2,
    collect: bool = False,
    max_threads: int = DEFAULT_MAX_THREADS,
    **constexprs,
) -> Report:
    """kernel[grid](*arguments, **constexprs), run here: `launch(add, (4,), x, y, n, BLOCK=128)`."""
    names = [parameter.name for parameter in function.params if parameter.name not in constexprs]
    values = dict(zip(names, arguments, strict=False)) | constexprs
    compiled = compile_for(function, values, num_warps=num_warps, num_stages=num_stages, capability=capability)
    return run(
        compiled.kernel, grid, compiled.arguments, names=compiled.names, collect=collect, max_threads=max_threads
    )


def _value(function, name: str, values: dict[str, Any]):
    if name in values:
        return values[name]
    default = inspect.signature(function.fn).parameters[name].default
    if default is inspect.Parameter.empty:
        raise TypeError(f"{function.__name__}: expected a value for {name}, got none")
    return getattr(default, "value", default)
