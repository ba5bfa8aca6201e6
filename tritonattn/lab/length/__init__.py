"""A pretrained model beyond its trained context: the `tritonattn length-study` command."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ...core import records
from ...core.errors import CommandError
from ...core.progress import Progress
from ...core.provenance import Environment, command_line
from ..demo import read_text
from ..demo.measurement import Subject
from ..demo.model import load
from ..demo.variants import BASELINE, Variant, variants
from ..texts import WONDERLAND
from .passes import check_head, losses
from .plot import draw
from .report import Study

_QUICK = 384
_BINS = 24

VARIANTS = (
    BASELINE,
    "sqrt_dim*1.08",
    "qwen_logn:CONTEXT",
    "qwen_logn:2048",
    "log_key_count:CONTEXT",
    "llama4",
    "key_norm_mean",
)


def run(options: Namespace) -> int:
    """Run the text through the model once a variant, print the tables, write the files."""
    file = options.text or WONDERLAND
    text = read_text(file)
    subject = load(options.model, options.device)
    check_head(subject)
    context = subject.context
    if context is None:
        raise CommandError(
            f"--model: expected one whose configuration has max_position_embeddings, got {subject.name!r}"
        )
    tokens = _tokens(subject, text, _QUICK if options.quick else options.max_tokens or context * 3 // 2, file.name)
    asked, start = variants(options.modes, context), tokens.shape[1] // 2
    environment = Environment.of(subject.device)
    found, alone = _measured(subject, tokens, asked, start, _Passes(options.out / "losses.jsonl", environment, tokens))
    study = Study(
        model=subject.name,
        text=file.name,
        context=context,
        bin=options.bin or max(1, tokens.shape[1] // _BINS),
        losses=found,
        start=start,
        alone=alone,
        environment=environment,
        command=command_line(),
        quick=options.quick,
    )
    print(f"{study.table()}\n\n{study.by_position()}")
    study.write_json(options.out / "length.json")
    draw(study.record(), options.out / "length.png")
    print(f"plot: {options.out / 'length.png'}")
    if options.quick:
        print("A smoke run (--quick): so few tokens say nothing about lengths.")
    return 0


def _tokens(subject: Subject, text: str, limit: int, name: str) -> Tensor:
    """int64 [1, S]"""
    tokens = subject.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :limit]
    if tokens.shape[1] < min(limit, 16):
        raise CommandError(f"--text: expected {limit} tokens, got {tokens.shape[1]}")
    if tokens.shape[1] < limit:
        print(f"{name} has {tokens.shape[1]} tokens, less than the {limit} asked for", file=sys.stderr)
    return tokens.to(subject.device)


def _measured(
    subject: Subject, tokens: Tensor, asked: list[Variant], start: int, passes: _Passes
) -> tuple[dict[str, Tensor], Tensor]:
    """Losses of every variant on all tokens, then of the baseline on the tokens from `start` alone."""
    found = {}
    with Progress(total=len(asked) + 1, unit="pass", leave=False) as progress:
        for one in asked:
            progress.set_description(one.name)
            found[one.name] = passes.get(subject, one, 0)
            progress.update()
        alone = passes.get(subject, asked[0], start)
        progress.update()
    return found, alone


class _Passes:
    """Losses of passes, a line each in a file, so that a study that was stopped goes on; rounded to 1e-4."""

    def __init__(self, file: Path, environment: Environment, tokens: Tensor) -> None:
        self.file, self.tokens = file, tokens
        self.about = {"tokens": tokens.shape[1], "sum": int(tokens.sum()), **asdict(environment)}
        self.known = records.read(file, lambda line: (line.pop("losses"), line), "a pass of `tritonattn length-study`")

    def get(self, subject: Subject, variant: Variant, start: int) -> Tensor:
        """Return the losses of the tokens from `start` on, computed where the file has none."""
        own = {"model": subject.name, **self.about, "variant": variant.name, "start": start}
        for values, about in self.known:
            if about == own:
                return torch.tensor(values)
        values = [round(x, 4) for x in losses(subject, self.tokens[:, start:], variant).tolist()]
        records.append(self.file, [{**own, "losses": values}])
        return torch.tensor(values)
