"""What each scaling does to a pretrained language model: the `tritonattn demo` command."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from ...core.command import CommandError, check_file, usable_device
from ...huggingface import Patched
from .measurement import Measurement, Subject, eager_loss, measure, patched_with
from .model import load
from .report import Report
from .variants import Variant, check_written, variants

if TYPE_CHECKING:
    from torch import Tensor

TEXT = Path(__file__).parent / "data" / "alice.txt"


@dataclass(frozen=True)
class Request:
    """What the user asked for; None takes the default.

    layers     as in `patch`
    by_layer   whether to print the statistics of every layer too, and what was patched
    """

    modes: tuple[str, ...]
    model: str | None = None
    text: Path | None = None
    max_tokens: int | None = None
    device: str = "cpu"
    json: Path | None = None
    plot: Path | None = None
    layers: tuple[int | str, ...] | None = None
    by_layer: bool = False


def run(request: Request) -> int:
    """Measure, print the tables, write the files.

    Returns 0, or 1 where sqrt_dim, which is the model's own scaling, gives another loss than its own attention.
    """
    check_written(request.modes or ("",))
    check_outputs(request)
    subject, tokens = subject_and_tokens(request)
    eager, measurements = _measure_all(subject, tokens, variants(request.modes, subject.context), request)
    report = Report(subject.name, tokens.shape[1], eager, tuple(measurements))
    print(report.table())
    if request.by_layer:
        print(f"\n{report.layers()}")
    print(report.check())
    print(report.advice())
    if request.json is not None:
        report.write_json(request.json)
    if request.plot is not None:
        report.draw(request.plot)
        print(f"plot: {request.plot}")
    return 0 if report.agrees else 1


def subject_and_tokens(request: Request) -> tuple[Subject, Tensor]:
    """The model asked for, and the tokens int64 [1, S] of the text, cut to what was asked for and to its context."""
    device, file = usable_device(request.device), request.text or TEXT
    text = read_text(file)
    subject = load(request.model, device)
    tokens = _tokens(subject, text, request.max_tokens)
    print(f"{subject.name}: {tokens.shape[1]} tokens of {file.name} on {device}", file=sys.stderr)
    return subject, tokens


def _measure_all(
    subject: Subject, tokens: Tensor, asked: list[Variant], request: Request
) -> tuple[float, list[Measurement]]:
    patched_with(subject, asked[0], request.layers).undo()  # layers that are not there: refused at once
    measurements: list[Measurement] = []

    def show(patched: Patched) -> None:
        if request.by_layer and request.layers is not None and not measurements:
            progress.write(f"{patched.report()}\n", file=sys.stdout)

    with tqdm(total=len(asked) + 1, unit="pass", leave=False) as progress:
        progress.set_description("eager")
        eager = eager_loss(subject, tokens)
        progress.update()
        for one in asked:
            progress.set_description(one.name)
            measurements.append(measure(subject, tokens, one, request.layers, show))
            progress.update()
    return eager, measurements


def check_outputs(request: Request) -> None:
    """Refuse before the work what would fail after it."""
    if request.plot is not None:
        from .plot import file_types

        if request.plot.suffix[1:].lower() not in file_types():
            raise CommandError(
                f"--plot: wanted a name ending in one of {', '.join(file_types())}, got {request.plot.name!r}"
            )
    if request.max_tokens is not None and request.max_tokens < 2:
        raise CommandError(f"--max-tokens: wanted at least 2, got {request.max_tokens}")
    for option, file in (("--json", request.json), ("--plot", request.plot)):
        check_file(option, file)


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--text: cannot read {str(file)!r} as UTF-8 text: {error}") from error


def _tokens(subject: Subject, text: str, limit: int | None) -> Tensor:
    """int64 [1, S], cut to limit and to the context that the model was trained on."""
    tokens = subject.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    context = subject.context
    if context is not None and tokens.shape[1] > context and (limit is None or limit > context):
        print(
            f"the text has {tokens.shape[1]} tokens; using the first {context}, the model's context",
            file=sys.stderr,
        )
        limit = context
    tokens = tokens[:, :limit]
    if tokens.shape[1] < 2:
        raise CommandError(f"--text: wanted at least 2 tokens, got {tokens.shape[1]}")
    return tokens.to(subject.device)
