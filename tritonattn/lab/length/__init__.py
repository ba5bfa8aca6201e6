"""A pretrained model beyond its trained context: the `tritonattn length-study` command."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ...core.command import CommandError, made_folder, usable_device
from ...core.provenance import Environment, command_line
from ..demo import read_text
from ..demo.measurement import Subject
from ..demo.model import load
from ..demo.variants import BASELINE, Variant, check_written, variants
from ..texts import WONDERLAND
from .passes import check_head, losses
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


@dataclass(frozen=True)
class Request:
    """What the user asked for; None takes the default."""

    model: str | None = None
    text: Path | None = None
    modes: tuple[str, ...] | None = None
    max_tokens: int | None = None
    bin: int | None = None
    quick: bool = False
    out: Path = Path("length-study")
    device: str = "cpu"


def run(request: Request) -> int:
    """Run the text through the model once a variant, print the table, write the files."""
    device = usable_device(request.device)
    _check(request)
    text = read_text(request.text or WONDERLAND)
    subject = load(request.model, device)
    check_head(subject)
    context = subject.context
    if context is None:
        raise CommandError(f"--model: wanted one whose configuration has max_position_embeddings, got {subject.name!r}")
    tokens = _tokens(subject, text, _QUICK if request.quick else request.max_tokens or context * 3 // 2, request)
    study = _study(subject, tokens, variants(request.modes or VARIANTS, context), context, request)
    print(f"{study.table()}\n\n{study.by_position()}")
    study.write_json(request.out / "length.json")
    study.draw(request.out / "length.png")
    print(f"plot: {request.out / 'length.png'}")
    if request.quick:
        print("A smoke run (--quick): so few tokens say nothing about lengths.")
    return 0


def _check(request: Request) -> None:
    for option, value in (("--max-tokens", request.max_tokens), ("--bin", request.bin)):
        if value is not None and value < 2:
            raise CommandError(f"{option}: wanted at least 2, got {value}")
    check_written(request.modes or VARIANTS)
    made_folder("--out", request.out)


def _tokens(subject: Subject, text: str, limit: int, request: Request) -> Tensor:
    """int64 [1, S]"""
    tokens = subject.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :limit]
    if tokens.shape[1] < min(limit, 16):
        raise CommandError(f"--text: wanted {limit} tokens, got {tokens.shape[1]}")
    if tokens.shape[1] < limit:
        name = (request.text or WONDERLAND).name
        print(f"{name} has {tokens.shape[1]} tokens, less than the {limit} wanted", file=sys.stderr)
    return tokens.to(subject.device)


def _study(subject: Subject, tokens: Tensor, asked: list[Variant], context: int, request: Request) -> Study:
    """Every variant on all tokens, then the baseline on the second half alone."""
    environment, start = Environment.of(subject.device), tokens.shape[1] // 2
    done = _Done(request.out / "losses.jsonl", environment, subject.name, tokens)
    found = {}
    with tqdm(total=len(asked) + 1, unit="pass", leave=False) as progress:
        for one in asked:
            progress.set_description(one.name)
            found[one.name] = done.get(one.name, 0, lambda one=one: losses(subject, tokens, one))
            progress.update()
        alone = done.get(BASELINE, start, lambda: losses(subject, tokens[:, start:], asked[0]))
        progress.update()
    return Study(
        model=subject.name,
        text=(request.text or WONDERLAND).name,
        context=context,
        bin=request.bin or max(1, tokens.shape[1] // _BINS),
        losses=found,
        start=start,
        alone=alone,
        environment=environment,
        command=command_line(),
        quick=request.quick,
    )


class _Done:
    """The passes of a file, so that a study that was stopped goes on. A line is a pass, its losses to 1e-4."""

    def __init__(self, path: Path, environment: Environment, model: str, tokens: Tensor) -> None:
        self.path = path
        self.about = {"model": model, "tokens": tokens.shape[1], "sum": int(tokens.sum()), **asdict(environment)}

    def get(self, variant: str, start: int, compute) -> Tensor:
        own = {**self.about, "variant": variant, "start": start}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                values = json.loads(line)
            except ValueError:  # the last line of a run that was killed while it wrote
                continue
            if {name: x for name, x in values.items() if name != "losses"} == own:
                return torch.tensor(values["losses"])
        losses = [round(x, 4) for x in compute().tolist()]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({**own, "losses": losses}) + "\n")
        return torch.tensor(losses)
