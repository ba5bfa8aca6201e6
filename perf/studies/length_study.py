"""The loss by position of a pretrained model, beyond its trained context, with each scaling.

A long text runs through the model, patched with each scaling, and the loss is shown by position, below and above the
number of positions that it was trained on. The same command goes on where it was stopped. Needs no GPU;
pip install '.[demo]'.
"""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor

from tritonattn.cli.models import WRITTEN_MODE, add_model
from tritonattn.cli.options import add_number, make_folder, names
from tritonattn.core import records
from tritonattn.core.errors import CommandError
from tritonattn.core.progress import Progress
from tritonattn.core.provenance import Environment, command_line
from tritonattn.lab.compare import read_text
from tritonattn.lab.compare.measurement import Subject, patched_with
from tritonattn.lab.compare.model import load
from tritonattn.lab.figures import COLOURS, foot, plain_numbers, save, staggered, styles
from tritonattn.lab.modes import BASELINE, PatchMode, check_written, patch_modes

from ..options import add_folder
from .texts import WONDERLAND

VARIANTS = (
    BASELINE,
    "sqrt_dim*1.08",
    "qwen_logn:CONTEXT",
    "qwen_logn:2048",
    "log_key_count:CONTEXT",
    "llama4",
    "key_norm_mean",
)
_QUICK = 384
_BINS = 24
_ROWS = 256  # logits that exist at a time
# Settings that change a model's logits after the head.
_AFTER_THE_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale")
_NORMAL = 1.96  # quantile of a 95% interval
_LINEAR = 0.01  # differences up to here stand on a linear part of their axis


def add_arguments(parser: ArgumentParser) -> None:
    add_model(parser, "all of Alice in Wonderland")
    modes = (
        f"{WRITTEN_MODE} (default: sqrt_dim, sqrt_dim*1.08, qwen_logn:CONTEXT, qwen_logn:2048, "
        "log_key_count:CONTEXT, llama4, key_norm_mean)"
    )
    parser.add_argument("--modes", type=names, default=VARIANTS, metavar="A,B", help=modes)
    tokens = "use the first N tokens of the text (default: one and a half times the trained context)"
    add_number(parser, "--max-tokens", 2, tokens)
    positions = "average the loss over N positions in tables and plots (default: a 24th of the tokens)"
    add_number(parser, "--bin", 2, positions)
    parser.add_argument("--quick", action="store_true", help="use 384 tokens, to see that it works")
    add_folder(parser, "length-study")
    parser.set_defaults(run=run)


def run(options: Namespace) -> None:
    """Run the text through the model once a variant, print the tables, write the files."""
    check_written(options.modes)
    make_folder("--out", options.out)
    file = options.text or WONDERLAND
    subject, tokens, context = _opened(options, file)
    count = tokens.shape[1]
    asked, start, environment = patch_modes(options.modes, context), count // 2, Environment.of(subject.device)
    passes = [*((one, 0) for one in asked), (asked[0], start)]
    *found, alone = _measured(options.out / "losses.jsonl", subject, tokens, passes, environment)
    found = {one.name: values for one, values in zip(asked, found, strict=True)}
    width = options.bin or max(1, count // _BINS)
    bins = _ranges(1, *range(width, count, width), count)
    later = [(lo, hi) for lo, hi in bins if lo > start]
    print(f"{_by_variant(found, alone, start, context)}\n\n{_by_position(found, bins)}")
    record = {
        "model": subject.name,
        "text": file.name,
        "tokens": count,
        "context": context,
        "quick": options.quick,
        "environment": asdict(environment),
        "command": command_line(),
        "bins": bins,
        "loss": {name: [round(_mean(x, lo, hi), 4) for lo, hi in bins] for name, x in found.items()},
        "second_part_alone": {
            "start": start,
            "loss": round(_mean(alone, 1, count - start), 4),
            "by_bin": [round(_mean(alone, lo - start, hi - start), 4) for lo, hi in later],
        },
    }
    records.write(options.out / "length.json", json.dumps(record) + "\n")
    save(figure_of(record), options.out / "length.png")
    print(f"plot: {options.out / 'length.png'}")
    if options.quick:
        print("A smoke run (--quick): so few tokens say nothing about lengths.")


def _opened(options: Namespace, file: Path) -> tuple[Subject, Tensor, int]:
    """Load the model, and read the text as tokens [1, S]; return both and the trained context.

    Raises CommandError for a model without a head, or with logits that differ from its head's output.
    """
    text = read_text(file)
    subject = load(options.model, options.device)
    for name in _AFTER_THE_HEAD:
        if getattr(subject.model.config, name, None) not in (None, 1.0):
            raise CommandError(f"--model: expected one whose head gives its logits, got {subject.name!r} with {name}")
    if subject.model.get_output_embeddings() is None:
        raise CommandError(f"--model: expected a language model with a head, got {type(subject.model).__name__}")
    if (context := subject.context) is None:
        raise CommandError(
            f"--model: expected one whose configuration has max_position_embeddings, got {subject.name!r}"
        )
    limit = _QUICK if options.quick else options.max_tokens or context * 3 // 2
    tokens = subject.tokens(text)[:, :limit]
    count = tokens.shape[1]
    if count < min(limit, 16):
        raise CommandError(f"--text: expected {limit} tokens, got {count}")
    if count < limit:
        print(f"{file.name} has {count} tokens, less than the {limit} asked for", file=sys.stderr)
    return subject, tokens, context


def _measured(
    file: Path, subject: Subject, tokens: Tensor, passes: list[tuple[PatchMode, int]], environment: Environment
) -> Iterable[Tensor]:
    """Yield the losses of each pass: those of a variant on the tokens from one on.

    A pass is a line in a file, rounded to 1e-4, so that a study that was stopped goes on.
    """
    about = {"model": subject.name, "tokens": tokens.shape[1], "sum": int(tokens.sum()), **asdict(environment)}
    known = records.read(file, lambda line: (line.pop("losses"), line), "a pass of `python -m perf length-study`")
    for variant, start in (progress := Progress(passes, unit="pass", leave=False)):
        progress.set_description(variant.name)
        asked = {**about, "variant": variant.name, "start": start}
        values = next((found for found, of in known if of == asked), None)
        if values is None:
            values = [round(x, 4) for x in losses(subject, tokens[:, start:], variant).tolist()]
            records.append(file, [{**asked, "losses": values}])
        yield torch.tensor(values)


def losses(subject: Subject, tokens: Tensor, variant: PatchMode) -> Tensor:
    """Compute the cross entropy in nats of tokens 1 to S - 1 of tokens [1, S], given all before: fp32 [S - 1].

    Logits exist for a few hundred positions at a time, never [S, vocabulary].
    """
    with patched_with(subject, variant), torch.inference_mode():
        model: Any = subject.model
        states = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0, :-1]  # [S - 1, width]
        head = model.get_output_embeddings()
        rows = zip(states.split(_ROWS), tokens[0, 1:].split(_ROWS), strict=True)
        return torch.cat([F.cross_entropy(head(x).float(), y, reduction="none") for x, y in rows]).cpu()


def _ranges(*edges: int) -> list[tuple[int, int]]:
    return [(lo, hi) for lo, hi in pairwise(edges) if lo < hi]


def _mean(values: Tensor, lo: int, hi: int) -> float:
    """Average the losses of tokens lo to hi - 1: values[0] is that of token 1."""
    return float(values[lo - 1 : hi - 1].mean())


def _by_variant(found: dict[str, Tensor], alone: Tensor, start: int, context: int) -> str:
    """Tabulate mean losses within the trained context and beyond, and their differences from the baseline's.

    alone   the baseline's losses without the tokens before `start`: alone[0] is that of token start + 1
    """
    base = next(iter(found.values()))
    count = len(base) + 1
    parts = _ranges(1, max(1, min(context // 2, count)), min(context, count), count)
    rows = []
    for name, values in found.items():
        rows.append([name])
        for lo, hi in parts:
            moved = "-" if values is base else _difference(values[lo - 1 : hi - 1], base[lo - 1 : hi - 1])
            rows[-1] += [f"{values[lo - 1 : hi - 1].double().mean():.4f}", moved]
    first = max(context, start + 1)
    if first < count:
        values, without = alone[first - start - 1 :], f"sqrt_dim, nothing before {start}"
        moved = _difference(values, base[first - 1 :])
        rows.append([without, *[""] * (2 * len(parts) - 2), f"{values.double().mean():.4f}", moved])
    titles = [(f"loss, tokens {lo} to {hi - 1}", "moved") for lo, hi in parts]
    return tabulate(rows, ["scaling", *(title for pair in titles for title in pair)], "github", **records.FIGURES)


def _by_position(found: dict[str, Tensor], bins: list[tuple[int, int]]) -> str:
    """Tabulate the mean loss of every variant, a row a range of tokens."""
    rows = [(f"{lo} to {hi - 1}", *(f"{_mean(values, lo, hi):.3f}" for values in found.values())) for lo, hi in bins]
    return tabulate(rows, ["tokens", *found], "github", **records.FIGURES)


def _difference(values: Tensor, base: Tensor) -> str:
    """Format a mean difference, as if of independent values, with its 95% interval; a star where it excludes 0."""
    moved = values.double() - base.double()
    half = _NORMAL * float(moved.std()) / math.sqrt(len(moved)) if len(moved) > 1 else math.inf
    mean = float(moved.mean())
    return f"{mean:+.4f} ± {half:.4f}" + " *" * (abs(mean) > half)


def figure_of(record: dict[str, Any]) -> Figure:
    """Draw the loss by position, and its difference from the baseline's, from length.json."""
    figure = Figure(figsize=(10.5, 5.6), layout="constrained")
    loss, moved = figure.subplots(1, 2, sharex=True)
    bins, curves, alone = record["bins"], record["loss"], record["second_part_alone"]
    middles = [(lo + hi) / 2 for lo, hi in bins]
    baseline = next(iter(curves))
    looks = styles(curves)
    for index, (name, values) in enumerate(curves.items()):
        marks = staggered(index, len(curves), len(middles))
        loss.plot(middles, values, **looks[name], markevery=marks)
        moved.plot(middles, _less(values, curves[baseline]), **looks[name], markevery=marks)
    without = f"{baseline}, nothing before {alone['start']}"
    looks[without] = {"color": COLOURS[-1], "linestyle": ":", "marker": "x", "markersize": 4, "linewidth": 1.3}
    later = [index for index, (lo, _) in enumerate(bins) if lo > alone["start"]]
    xs = [middles[index] for index in later]
    loss.plot(xs, alone["by_bin"], **looks[without])
    moved.plot(xs, _less(alone["by_bin"], [curves[baseline][index] for index in later]), **looks[without])
    for axes in (loss, moved):
        axes.axvline(record["context"], color="grey", linewidth=0.8)
        axes.set_xlabel(f"position (line: end of the trained context, {record['context']:,})")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylabel("nats per token")
    loss.set_title("Loss by position", fontsize=10)
    moved.set_title(f"The same, less {baseline}'s", fontsize=10)
    moved.set_yscale("symlog", linthresh=_LINEAR)
    moved.set_ylim(bottom=min(-1.5 * _LINEAR, 1.5 * moved.dataLim.y0))
    plain_numbers(moved.yaxis)
    figure.suptitle(_message(record), fontsize=12)
    about = f"{record['tokens']:,} tokens of {record['text']}"
    foot(figure, f"Measured: {about}. {Environment(**record['environment'])}, `{record['command']}`", looks, columns=4)
    return figure


def _message(record: dict[str, Any]) -> str:
    """Name the scaling with the lowest mean loss beyond the trained context, or else in all of the text."""
    bins = record["bins"]
    beyond = [index for index, (lo, _) in enumerate(bins) if lo >= record["context"]]
    where = "beyond the trained context" if beyond else "within the trained context"
    sums = {
        name: math.fsum(values[index] * (bins[index][1] - bins[index][0]) for index in beyond or range(len(bins)))
        for name, values in record["loss"].items()
    }
    best, base = min(sums, key=sums.__getitem__), next(iter(sums))
    found = f"no scaling lowers {base}'s loss" if best == base else f"{best} has the lowest loss"
    return f"{record['model']}: {found} {where}"


def _less(values: list[float], base: list[float]) -> list[float]:
    return [one - other for one, other in zip(values, base, strict=True)]
