"""`tritonattn advise`."""

from __future__ import annotations

import argparse

from ..core.errors import CommandError
from .language_model import NEEDED, add_opening
from .options import add_number, check_file, require
from .threads import limit_threads

HELP = "say which scaling a model should try first, on which layers, and why"
DESCRIPTION = (
    "Run a text through a pretrained language model, look at the softmax of every attention layer, and say which "
    "scaling to try first, or to keep sqrt_dim: why, what to watch, what would make it turn back, and what each of "
    "that rests on. Needs no GPU."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_opening(parser)
    add_number(parser, "--context", 2, "tokens that the model was trained for (default: what its config says)")
    parser.set_defaults(max_tokens=512)


def run(options: argparse.Namespace) -> int:
    """Print the advice for a model on a text, and write it."""
    require("advise", NEEDED, extra="demo")
    from dataclasses import asdict

    from ..analysis import advise
    from ..core.provenance import Environment, command_line
    from ..core.records import write_json
    from ..lab.demo import subject_and_tokens

    check_file("--json", options.json)
    limit_threads()
    subject, tokens = subject_and_tokens(options)
    try:
        advice = advise(subject.model, tokens, context=options.context)
    except (NotImplementedError, ValueError) as error:
        raise CommandError(str(error)) from error
    print(advice.report())
    if options.json is not None:
        environment = Environment.of(subject.device, command_line(), peers=("transformers",))
        about = {"model": subject.name, "tokens": tokens.shape[1], "environment": asdict(environment)}
        write_json(options.json, about | advice.as_dict())
    return 0
