"""The loss and attention of a pretrained language model with each scaling: `tritonattn compare`."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from torch import Tensor

from ...core.errors import CommandError
from ...core.progress import Progress
from ...core.provenance import Environment, command_line
from ..modes import PatchMode, check_written, patch_modes
from .measurement import Measurement, Subject, eager_loss, measure, patched_with
from .model import load
from .report import Report

TEXT = Path(__file__).parent / "data" / "alice.txt"


def run(options: Namespace) -> int:
    """Measure, print the tables, write the files; `options` are those of the command.

    Returns 0, or 1 where sqrt_dim, which is the model's scaling, gives another loss than its eager attention.
    """
    subject, tokens = subject_and_tokens(options)
    eager, measurements = _measure_all(subject, tokens, patch_modes(options.modes, subject.context), options)
    report = Report(subject.name, tokens.shape[1], eager, tuple(measurements))
    print(report.table())
    print(f"\n{report.layers()}")
    print(report.check())
    print(report.advice())
    if options.json is not None:
        report.write_json(options.json)
    from ..figures import save
    from .plot import figure_of

    save(figure_of(subject.name, measurements, Environment.of(subject.device, command_line())), options.plot)
    print(f"plot: {options.plot}")
    return 0 if report.agrees else 1


def check(options: Namespace) -> None:
    """Raise CommandError for modes that no model has, and for pictures that cannot be drawn."""
    check_written(options.modes or ("",))
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    types = sorted(FigureCanvasAgg.get_supported_filetypes())
    if options.plot.suffix[1:].lower() not in types:
        expected = f"a name ending in one of {', '.join(types)}"
        raise CommandError(f"--plot: expected {expected}, got {options.plot.name!r}")


def subject_and_tokens(options: Namespace) -> tuple[Subject, Tensor]:
    """Load --model, and read --text as int64 tokens [1, S], cut to --max-tokens and to the model's context."""
    file, limit = options.text or TEXT, options.max_tokens
    text = read_text(file)
    subject = load(options.model, options.device)
    tokens = subject.tokens(text)
    context, found = subject.context, tokens.shape[1]
    if context is not None and found > context and (limit is None or limit > context):
        print(f"the text has {found} tokens; using the first {context}, the model's context", file=sys.stderr)
        limit = context
    tokens = tokens[:, :limit]
    if tokens.shape[1] < 2:
        raise CommandError(f"--text: expected at least 2 tokens, got {tokens.shape[1]}")
    print(f"{subject.name}: {tokens.shape[1]} tokens of {file.name} on {options.device}", file=sys.stderr)
    return subject, tokens


def _measure_all(
    subject: Subject, tokens: Tensor, asked: list[PatchMode], options: Namespace
) -> tuple[float, list[Measurement]]:
    with patched_with(subject, asked[0], options.layers) as patched:  # refuses missing layers before any pass
        if options.layers is not None:
            print(f"layers: {', '.join(patched.layers)}\n")
    measurements = []
    with Progress(total=len(asked) + 1, unit="pass", leave=False) as progress:
        progress.set_description("eager")
        eager = eager_loss(subject, tokens)
        progress.update()
        for one in asked:
            progress.set_description(one.name)
            measurements.append(measure(subject, tokens, one, options.layers))
            progress.update()
    return eager, measurements


def read_text(file: Path) -> str:
    """Read a UTF-8 text. Raises CommandError."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--text: cannot read {str(file)!r} as UTF-8 text: {error}") from error
