"""The `tritonattn simulate` command."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ...core.provenance import Environment, command_line
from .measures import Measures, Point, Sample, measure, points_of
from .paper import PANELS, ROWS, component, measures_of
from .report import Findings
from .verdict import CONDITIONS, OWN_CURVES, Batch, Condition, Curves, Reach, reach_of

PARTS = ("paper", "sweep", "verdict")
_SETS, _FEW_SETS = 64, 8  # sequences in a batch of the verdict


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    parts   of PARTS
    keys    kinds of keys; the first, and the first dimension, are those around which the other axis is varied
    plot    a folder that exists
    """

    parts: tuple[str, ...]
    modes: tuple[str, ...]
    counts: tuple[int, ...]
    dims: tuple[int, ...]
    keys: tuple[str, ...]
    seed: int
    device: torch.device
    quick: bool = False
    json: Path | None = None
    plot: Path | None = None


def run(request: Request) -> int:
    """Simulate, print the tables, write the files; returns 0."""
    points = points_of(request.counts, request.dims, request.keys) if "sweep" in request.parts else []
    conditions = CONDITIONS if "verdict" in request.parts else ()
    rows, panels = (ROWS, PANELS) if "paper" in request.parts else ((), ())
    with tqdm(
        total=len(rows) + (len(points) + len(conditions)) * len(request.modes), leave=False, unit="case"
    ) as progress:
        paper = {}
        for dim, mode in rows:
            progress.set_description("the paper")
            paper[dim, mode] = measures_of(dim, mode, request.seed, request.device)
            progress.update()
        sweep = _sweep(request, points, progress)
        verdict = _verdict(request, conditions, progress)
    findings = Findings(
        Environment.of(request.device),
        command_line(),
        request.seed,
        paper,
        [component(panel, request.seed, request.device) for panel in panels],
        sweep,
        verdict,
    )
    print(findings.text())
    print(f"\n{findings.environment}, seed {request.seed}, `{findings.command}`")
    if request.json is not None:
        findings.write_json(request.json)
    if request.plot is not None:
        from .plot import draw_all

        for file in draw_all(findings, request.plot):
            print(f"plot: {file}", file=sys.stderr)
    return 0


def _sweep(request: Request, points: list[Point], progress: tqdm) -> dict[tuple[Point, str], Measures]:
    found = {}
    for point in points:
        progress.set_description(f"{point.count} {point.keys} keys, d = {point.dim}")
        sample = Sample.of(point, request.seed, request.device)
        for mode in request.modes:
            found[point, mode] = measure(sample, mode)
            progress.update()
    return found


def _verdict(request: Request, conditions: tuple[Condition, ...], progress: tqdm) -> dict[tuple[Condition, str], Reach]:
    found = {}
    for condition in conditions:
        progress.set_description(condition.name)
        batch = Batch.of(condition, _FEW_SETS if request.quick else _SETS, request.seed, request.device)
        curves: dict[str, Curves] = {}
        for mode in request.modes:
            kind = mode if mode in OWN_CURVES else "none"
            if kind not in curves:
                curves[kind] = Curves(batch, kind)
            found[condition, mode] = reach_of(batch, mode, curves[kind])
            progress.update()
    return found
