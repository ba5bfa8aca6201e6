"""A pretrained model beyond its trained context: the `tritonattn length-study` command."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import records
from ...core.errors import CommandError
from ...core.progress import Progress
from ...core.provenance import Environment, command_line
from ..demo import read_text
from ..demo.measurement import Subject, patched_with
from ..demo.model import load
from ..modes import BASELINE, Variant, variants
from ..texts import WONDERLAND
from .report import Study, draw

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


def run(options: Namespace) -> int:
    """Run the text through the model once a variant, print the tables, write the files."""
    file = options.text or WONDERLAND
    text = read_text(file)
    subject = load(options.model, options.device)
    _check_head(subject)
    if (context := subject.context) is None:
        raise CommandError(
            f"--model: expected one whose configuration has max_position_embeddings, got {subject.name!r}"
        )
    tokens = _tokens(subject, text, _QUICK if options.quick else options.max_tokens or context * 3 // 2, file.name)
    asked, start = variants(options.modes, context), tokens.shape[1] // 2
    environment = Environment.of(subject.device)
    *found, alone = _measured(
        options.out / "losses.jsonl", subject, tokens, [*((one, 0) for one in asked), (asked[0], start)], environment
    )
    study = Study(
        model=subject.name,
        text=file.name,
        context=context,
        bin=options.bin or max(1, tokens.shape[1] // _BINS),
        losses={one.name: values for one, values in zip(asked, found, strict=True)},
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


def _check_head(subject: Subject) -> None:
    """Raise CommandError for a model without a head, or with logits that differ from its head's output."""
    for name in _AFTER_THE_HEAD:
        if getattr(subject.model.config, name, None) not in (None, 1.0):
            raise CommandError(f"--model: expected one whose head gives its logits, got {subject.name!r} with {name}")
    if subject.model.get_output_embeddings() is None:
        raise CommandError(f"--model: expected a language model with a head, got {type(subject.model).__name__}")


def _tokens(subject: Subject, text: str, limit: int, name: str) -> Tensor:
    """int64 [1, S]"""
    tokens = subject.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :limit]
    if tokens.shape[1] < min(limit, 16):
        raise CommandError(f"--text: expected {limit} tokens, got {tokens.shape[1]}")
    if tokens.shape[1] < limit:
        print(f"{name} has {tokens.shape[1]} tokens, less than the {limit} asked for", file=sys.stderr)
    return tokens.to(subject.device)


def _measured(
    file: Path, subject: Subject, tokens: Tensor, passes: list[tuple[Variant, int]], environment: Environment
) -> Iterable[Tensor]:
    """Yield the losses of each pass: those of a variant on the tokens from one on.

    A pass is a line in a file, rounded to 1e-4, so that a study that was stopped goes on.
    """
    about = {"model": subject.name, "tokens": tokens.shape[1], "sum": int(tokens.sum()), **asdict(environment)}
    known = records.read(file, lambda line: (line.pop("losses"), line), "a pass of `tritonattn length-study`")
    for variant, start in (progress := Progress(passes, unit="pass", leave=False)):
        progress.set_description(variant.name)
        this = {**about, "variant": variant.name, "start": start}
        values = next((found for found, of in known if of == this), None)
        if values is None:
            values = [round(x, 4) for x in losses(subject, tokens[:, start:], variant).tolist()]
            records.append(file, [{**this, "losses": values}])
        yield torch.tensor(values)


def losses(subject: Subject, tokens: Tensor, variant: Variant) -> Tensor:
    """Compute the cross entropy in nats of tokens 1 to S - 1 of tokens [1, S], given all before: fp32 [S - 1].

    Logits exist for a few hundred positions at a time, never [S, vocabulary].
    """
    with patched_with(subject, variant), torch.inference_mode():
        model: Any = subject.model
        states = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0, :-1]  # [S - 1, width]
        head = model.get_output_embeddings()
        rows = zip(states.split(_ROWS), tokens[0, 1:].split(_ROWS), strict=True)
        return torch.cat([F.cross_entropy(head(x).float(), y, reduction="none") for x, y in rows]).cpu()
