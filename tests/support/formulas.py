"""A check that a mode's dense formula shares no code with the formula that runs."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable

from tritonattn.core.statistics import Statistics
from tritonattn.core.visibility import Visibility
from tritonattn.scaling import Scaling


def assert_a_formula_of_its_own(mode: type[Scaling]) -> None:
    """multiplier() reaches neither scales() nor what Visibility and Statistics offer."""
    names = _names_reached_by(mode.multiplier, set())
    offered = {name for owner in (Visibility, Statistics) for name in vars(owner) if not name.startswith("_")}
    forbidden = (offered - {"sum", "max", "k"}) | {
        "scales",
        "visibility",
        "statistics",
        "key_lengths_of",
        "prefix_sum",
    }
    assert not names & forbidden


def _names_reached_by(function: Callable, seen: set[str]) -> set[str]:
    """The identifiers in the source of a function and of those of the package's functions that it calls."""
    names = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        names |= {getattr(node, field) for field in ("id", "attr") if hasattr(node, field)}
    module = sys.modules[function.__module__]
    for name in names - seen:
        called = getattr(module, name, None)
        if inspect.isfunction(called) and called.__module__.startswith("tritonattn"):
            names |= _names_reached_by(called, seen | names)
    return names
