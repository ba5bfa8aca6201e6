"""Triton's interpreter without what it does for nothing, which is three quarters of its time."""

from dataclasses import replace
from operator import index
from typing import Any

import numpy as np
from triton import language
from triton.language import core, semantic
from triton.runtime import interpreter

_call, _block_type, _tensor = interpreter.InterpretedFunction.__call__, core.block_type.__init__, core.tensor.__init__
_numpy_type, _broadcast = interpreter._get_np_dtype, semantic.TritonSemantic.broadcast_impl_value
_of_block_types: dict[tuple, dict[str, Any]] = {}
_of_shapes: dict[tuple, tuple] = {}
_numpy_types: dict[str, Any] = {}


def quicken() -> None:
    """Drop three things from the interpreter, results unchanged but those of an older fma.

    It replaces the builtins of triton.language at each launch of a kernel, and once more at every call of a function
    inside, tl.sum and tl.max included, though nobody has put them back in between. It repeats all arithmetic of int32
    in int64, to look for an overflow, but reports one only where its option `debug` is set, which is off. And it
    describes again the type and shape of every value, of which there are few. In older versions fma rounds once.
    """
    interpreter.InterpretedFunction.__call__ = _called
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
    core.block_type.__init__, core.tensor.__init__ = _begin_block_type, _begin_tensor
    interpreter._get_np_dtype = _numpy_type_of
    semantic.TritonSemantic.broadcast_impl_value = _broadcast_other_shapes
    if not hasattr(interpreter._interpreter, "fma_fp32"):
        interpreter.InterpreterBuilder.create_fma = _fused


def _fused(builder: interpreter.InterpreterBuilder, x, y, z):
    """tl.fma as a device has it, rounded once. Triton rounded the product too: gradients then miss their bound."""
    with np.errstate(all="ignore"):
        wide = x.data.astype(np.float64) * y.data + z.data
    return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)


def _called(function: interpreter.InterpretedFunction, *args, **kwargs):
    if any(core.is_builtin(module.load) for module in (language, core)):
        return _call(function, *args, **kwargs)
    return function.rewrite()(*args, **kwargs)


def _begin_block_type(block: core.block_type, element_ty: core.dtype, shape) -> None:
    key = (element_ty.name, *map(index, shape))
    if key not in _of_block_types:
        _block_type(block, element_ty, shape)
        _of_block_types[key] = dict(block.__dict__)
    block.__dict__.update(_of_block_types[key])


def _begin_tensor(tensor: core.tensor, handle, type: core.dtype) -> None:
    key = tuple(type.shape) if type.is_block() else ()
    if key not in _of_shapes:
        _tensor(tensor, handle, type)
        _of_shapes[key] = tensor.shape, tensor.numel
    tensor.handle, tensor.type, tensor.dtype = handle, type, type.scalar
    tensor.shape, tensor.numel = _of_shapes[key]


def _numpy_type_of(type: core.dtype):
    name = type.scalar.name
    if name not in _numpy_types:
        _numpy_types[name] = _numpy_type(type)
    return _numpy_types[name]


def _broadcast_other_shapes(of: semantic.TritonSemantic, x: core.tensor, y: core.tensor):
    return (x, y) if x.shape is y.shape else _broadcast(of, x, y)
