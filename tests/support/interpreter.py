"""Triton's interpreter without what it does for nothing, which is two thirds of its time."""

from dataclasses import replace

from triton import language
from triton.runtime import interpreter

_call = interpreter.InterpretedFunction.__call__


def quicken() -> None:
    """Drop two things from the interpreter, results unchanged.

    It replaces the builtins of triton.language at each launch of a kernel, and once more at every call of a function
    inside, tl.sum and tl.max included, though nobody has put them back in between. And it repeats all arithmetic of
    int32 in int64, to look for an overflow, but reports one only where its option `debug` is set, which is off.
    """
    interpreter.InterpretedFunction.__call__ = _called
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)


def _called(function: interpreter.InterpretedFunction, *args, **kwargs):
    if any(language.core.is_builtin(module.load) for module in (language, language.core)):
        return _call(function, *args, **kwargs)
    return function.rewrite()(*args, **kwargs)
