"""The cost of watching a training run with `tritonattn.analysis.Monitor`: training steps of a small Llama."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from tabulate import tabulate

from tritonattn.analysis import Monitor, Thresholds
from tritonattn.autotune.timing import Contestant, median_ratio, take_turns
from tritonattn.cli.options import check_file, device, whole_number
from tritonattn.core.errors import CommandError
from tritonattn.core.provenance import Environment
from tritonattn.core.records import FIGURES, write_json
from tritonattn.huggingface import patch
from tritonattn.nn.registry import scaling_of_layer

from ..options import command_line

EVERY = 50  # the Monitor's default
VOCABULARY = 4096
QUIET = Thresholds(None, None, None)


def model_of(options: argparse.Namespace) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        intermediate_size=2 * options.width,
        num_hidden_layers=4,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64,
        attn_implementation="sdpa",
    )
    return transformers.LlamaForCausalLM(config).to(options.device).train()


def contestant(options: argparse.Namespace, every: int | None, folder: str, contexts: ExitStack) -> Contestant:
    """Make a training step of a new model; `every` is its Monitor's, None for no Monitor."""
    model = model_of(options)
    if options.scaling is not None:
        patch(model, options.scaling)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    shape = options.batch, options.length
    tokens = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(1)).to(options.device)
    monitor = None
    if every is not None:
        file = Path(folder) / f"{every}.jsonl"
        monitor = contexts.enter_context(Monitor(model, every=every, file=file, thresholds=QUIET))

    def step(number: int) -> None:
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            monitor.step(loss)

    step(0)  # the only step that a rare Monitor watches
    return step


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Time a step in milliseconds, and take the median of the rounds' ratios to no Monitor."""
    monitors = {"no Monitor": None, "Monitor, a step that is not watched": 10**9, "Monitor, a watched step": 1}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as contexts:
        contestants = {name: contestant(options, every, folder, contexts) for name, every in monitors.items()}
        taken = take_turns(contestants, options.device, options.repeats)
    plain = taken["no Monitor"]
    return {
        name: {
            "median_ms": statistics.median(times),
            "time_ratio": median_ratio(times, plain),
        }
        for name, times in taken.items()
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=whole_number, default=15, help="rounds, in which all take turns")
    parser.add_argument("--width", type=whole_number, default=256, help="of the model; its heads are of 64")
    parser.add_argument("--length", type=whole_number, default=512, help="tokens of a sequence")
    parser.add_argument("--batch", type=whole_number, default=2)
    parser.add_argument("--scaling", help="patch the model with this mode (default: the attention that it has)")
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--threads", type=whole_number, default=2)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, print the table and write the file."""
    check_file("--json", options.json)
    if options.scaling is not None:
        try:
            scaling_of_layer(options.scaling, 1)
        except ValueError as error:
            raise CommandError(f"--scaling: {error}") from error
    torch.set_num_threads(options.threads)
    environment = Environment.of(options.device, command_line("monitor", options))
    found = measure(options)
    idle, watched = (one["time_ratio"] - 1 for one in list(found.values())[1:])
    overall = idle + (watched - idle) / EVERY
    print(f"Measured: {environment}")
    print(
        f"{options.batch} x {options.length} tokens, width {options.width}, 4 layers, fp32, "
        f"{options.scaling or 'sdpa, not patched'}; forward, backward and AdamW\n"
    )
    rows = [(name, f"{one['median_ms']:.1f}", f"{one['time_ratio']:.3f}") for name, one in found.items()]
    print(tabulate(rows, ["", "ms per step", "time ratio"], "simple", **FIGURES))
    print(f"\nevery = {EVERY}: {overall:+.1%}, of which {(watched - idle) / EVERY:+.1%} in the watched steps")
    if options.json:
        shape = {name: getattr(options, name) for name in ("batch", "length", "width", "scaling", "repeats")}
        record = {"environment": asdict(environment), "shape": shape, "results": found, "overhead_at_50": overall}
        write_json(options.json, record)
