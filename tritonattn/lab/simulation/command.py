"""The `tritonattn simulate` command."""

from __future__ import annotations

import sys
from argparse import Namespace

from ...core.progress import Progress
from ...core.provenance import Environment, command_line
from .measures import Measures, Point, Sample, measure, points_of
from .paper import PANELS, ROWS, component, measures_of
from .report import Findings
from .verdict import CONDITIONS, OWN_CURVES, Batch, Condition, Curves, Reach, reach_of

_SETS, _FEW_SETS = 64, 8  # sequences in a batch of the verdict


def run(options: Namespace) -> int:
    """Simulate, print the tables, write the files; `options` are those of `tritonattn simulate`. Returns 0."""
    points = points_of(options.counts, options.dims, options.keys) if "sweep" in options.parts else []
    conditions = CONDITIONS if "verdict" in options.parts else ()
    rows, panels = (ROWS, PANELS) if "paper" in options.parts else ((), ())
    with Progress(
        total=len(rows) + (len(points) + len(conditions)) * len(options.modes), leave=False, unit="case"
    ) as progress:
        paper = {}
        for dim, mode in rows:
            progress.set_description("the paper")
            paper[dim, mode] = measures_of(dim, mode, options.seed, options.device)
            progress.update()
        sweep = _sweep(options, points, progress)
        verdict = _verdict(options, conditions, progress)
    findings = Findings(
        Environment.of(options.device),
        command_line(),
        options.seed,
        paper,
        [component(panel, options.seed, options.device) for panel in panels],
        sweep,
        verdict,
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


def _sweep(options: Namespace, points: list[Point], progress: Progress) -> dict[tuple[Point, str], Measures]:
    found = {}
    for point in points:
        progress.set_description(f"{point.count} {point.keys} keys, d = {point.dim}")
        sample = Sample.of(point, options.seed, options.device)
        for mode in options.modes:
            found[point, mode] = measure(sample, mode)
            progress.update()
    return found


def _verdict(
    options: Namespace, conditions: tuple[Condition, ...], progress: Progress
) -> dict[tuple[Condition, str], Reach]:
    found = {}
    for condition in conditions:
        progress.set_description(condition.name)
        batch = Batch.of(condition, _FEW_SETS if options.quick else _SETS, options.seed, options.device)
        curves: dict[str, Curves] = {}
        for mode in options.modes:
            kind = mode if mode in OWN_CURVES else "none"
            if kind not in curves:
                curves[kind] = Curves(batch, kind)
            found[condition, mode] = reach_of(batch, mode, curves[kind])
            progress.update()
    return found
