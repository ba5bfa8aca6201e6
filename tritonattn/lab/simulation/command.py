"""The `tritonattn simulate` command."""

from __future__ import annotations

import sys
from argparse import Namespace
from functools import partial

from ...core.progress import Progress
from ...core.provenance import Environment, command_line
from .measures import Measures, Point, Sample, measure, points_of
from .paper import PANELS, ROWS, component, measures_of
from .report import Findings
from .verdict import CONDITIONS, FACTOR_CURVES, Batch, Condition, Curves, Reach, reach_of

_SETS, _FEW_SETS = 64, 8  # sequences in a batch of the verdict
_Bar = partial(Progress, leave=False)


def run(options: Namespace) -> int:
    """Simulate, print the tables, write the files; `options` are those of `tritonattn simulate`. Returns 0."""
    points = points_of(options.counts, options.dims, options.keys) if "sweep" in options.parts else []
    conditions = CONDITIONS if "verdict" in options.parts else ()
    rows, panels = (ROWS, PANELS) if "paper" in options.parts else ((), ())
    drawn = options.seed, options.device
    findings = Findings(
        Environment.of(options.device),
        command_line(),
        options.seed,
        {(dim, mode): measures_of(dim, mode, *drawn) for dim, mode in _Bar(rows, desc="the paper")},
        [component(panel, *drawn) for panel in panels],
        _sweep(options, points),
        _verdict(options, conditions),
    )
    print(findings.text())
    print(f"\n{findings.source()}")
    if options.json is not None:
        findings.write_json(options.json)
    if options.plot is not None:
        from .plot import draw_all

        for file in draw_all(findings, options.plot):
            print(f"plot: {file}", file=sys.stderr)
    return 0


def _sweep(options: Namespace, points: list[Point]) -> dict[tuple[Point, str], Measures]:
    found = {}
    for point in _Bar(points, desc="the sweep"):
        sample = Sample.of(point, options.seed, options.device)
        found |= {(point, mode): measure(sample, mode) for mode in options.modes}
    return found


def _verdict(options: Namespace, conditions: tuple[Condition, ...]) -> dict[tuple[Condition, str], Reach]:
    found = {}
    for condition in _Bar(conditions, desc="the verdict"):
        batch = Batch.of(condition, _FEW_SETS if options.quick else _SETS, options.seed, options.device)
        curve_of = {mode: mode if mode in FACTOR_CURVES else "none" for mode in options.modes}
        curves = {name: Curves(batch, name) for name in set(curve_of.values())}
        for mode in options.modes:
            found[condition, mode] = reach_of(batch, mode, curves[curve_of[mode]])
    return found
