"""Methods of a module's class whose code calls F.scaled_dot_product_attention, found without a run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType

from torch.nn.functional import scaled_dot_product_attention

_NOT_READ = ("torch", "tritonattn")


@cache
def attending_methods(of: type) -> tuple[str, ...]:
    """Public names, `forward` among them, by themselves or by methods and functions of Python that they name."""
    functions = {name for base in of.__mro__ for name, x in vars(base).items() if isinstance(x, FunctionType)}
    public = sorted(name for name in functions if not name.startswith("_"))
    return tuple(name for name in public if _attends(getattr(of, name), of, set()))


def _attends(function: object, of: type, seen: set[object]) -> bool:
    function = inspect.unwrap(function) if callable(function) else function
    if not isinstance(function, FunctionType) or function in seen or function.__module__.split(".")[0] in _NOT_READ:
        return False
    seen.add(function)
    names = set(_names(function.__code__))
    named = [function.__globals__.get(name) for name in names]
    if scaled_dot_product_attention.__name__ in names or scaled_dot_product_attention in named:
        return True
    return any(_attends(x, of, seen) for x in [*named, *(getattr(of, name, None) for name in names)])


def _names(code: CodeType) -> Iterator[str]:
    """Names in the code of a function and of the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
