"""The `tritonattn simulate` command."""

from __future__ import annotations

import sys
from argparse import Namespace
from functools import partial

from ...core.progress import Progress
from ...core.provenance import Environment, command_line
from .measures import Sample, measure, points_of
from .paper import PANELS, ROWS, component, measures_of
from .report import Findings
from .verdict import CONDITIONS, Batch, reaches_of

_SETS, _FEW_SETS = 64, 8  # sequences in a batch of the verdict


def run(options: Namespace) -> int:
    """Simulate, print the tables, write the files; `options` are those of `tritonattn simulate`. Returns 0."""
    drawn, bar = (options.seed, options.device), partial(Progress, leave=False)
    points = points_of(options.counts, options.dims, options.keys) if "sweep" in options.parts else []
    conditions = CONDITIONS if "verdict" in options.parts else ()
    rows, panels = (ROWS, PANELS) if "paper" in options.parts else ((), ())
    paper = {(dim, mode): measures_of(dim, mode, *drawn) for dim, mode in bar(rows, desc="the paper")}
    components = [component(panel, *drawn) for panel in panels]
    sweep = {}
    for point in bar(points, desc="the sweep"):
        sample = Sample.of(point, *drawn)
        sweep[point] = {mode: measure(sample, mode) for mode in options.modes}
    verdict = {}
    for condition in bar(conditions, desc="the verdict"):
        batch = Batch.of(condition, _FEW_SETS if options.quick else _SETS, *drawn)
        verdict[condition] = reaches_of(batch, options.modes)
    source = Environment.of(options.device), command_line(), options.seed
    findings = Findings(*source, paper, components, sweep, verdict)
    print(f"{findings.text()}\n\n{findings.source()}")
    if options.json is not None:
        findings.write_json(options.json)
    if options.plot is not None:
        from ..figures import save
        from .plot import figures_of

        for name, figure in figures_of(findings).items():
            save(figure, options.plot / f"{name}.png")
            print(f"plot: {options.plot / f'{name}.png'}", file=sys.stderr)
    return 0
