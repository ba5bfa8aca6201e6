"""The `tritonattn advise` command."""

from __future__ import annotations

import json

import torch
import transformers

from ..analysis import advise
from ..core.command import CommandError
from ..lab.demo import Request, check_outputs, subject_and_tokens


def run(request: Request, context: int | None) -> int:
    """Print the advice for a model on a text, and write it."""
    if context is not None and context < 2:
        raise CommandError(f"--context: wanted at least 2, got {context}")
    check_outputs(request)
    subject, tokens = subject_and_tokens(request)
    try:
        advice = advise(subject.model, tokens, context=context)
    except (NotImplementedError, ValueError) as error:
        raise CommandError(str(error)) from error
    print(advice.report())
    if request.json is not None:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        record = {"model": subject.name, "tokens": tokens.shape[1], "versions": versions, **advice.as_dict()}
        request.json.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return 0
