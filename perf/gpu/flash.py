"""Check backend "flash" on this GPU, and time the kernels with it, to choose what "auto" takes.

Each installed library runs calls of every form, which are held to float64 with their gradients: right, refused by name,
or wrong. Then causal bf16 with the vector of log_key_count, 8,192 tokens of 16 heads, forward and backward. With
--write the user's table of this card names the library where no call is wrong and it is at least 5 % faster at every
head dim; "auto" then runs it in each call that it takes. Else the table names none.

--errors needs no GPU: errors of folded factors, on a stand-in for FlashAttention that computes eagerly, and of
factors that act in fp32, as in the kernels.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace

import pytest
import torch
from tabulate import tabulate

import tritonattn
from tests.kernels import harness
from tests.support import flash as stand_in
from tritonattn.autotune.timing import card_state, median_ratio, take_turns
from tritonattn.backends.flash.libraries import card_of, libraries
from tritonattn.core.provenance import commit
from tritonattn.tuning import lookup
from tritonattn.tuning.config import Target
from tritonattn.tuning.gpus import table_name
from tritonattn.tuning.table import Table, TableError, kernels_fingerprint, write_table

from . import flash_checks

HEAD_DIMS = (64, 128)
LEAST_GAIN = 1.05
_TOKENS, _HEADS, _ROUNDS = 8192, 16, 20
_TOKENS_OF_ERRORS, _SEEDS = 2048, 3
SCALINGS = {
    "log_key_count, base e": tritonattn.SCALINGS["log_key_count"](base=math.e),
    "log_key_count, base 64": tritonattn.SCALINGS["log_key_count"](base=64),
    "key_norm_mean": tritonattn.SCALINGS["key_norm_mean"](),
}


def obstacle(device: str) -> str | None:
    """Say why there is nothing to compare on this machine, or return None."""
    if device != "cuda" or not torch.cuda.is_available():
        return "backend 'flash' runs on a GPU"
    found = libraries(card_of(torch.device("cuda", torch.cuda.current_device())))
    return None if found else "no FlashAttention is installed"


def gains(ours: str, head_dims: tuple[int, ...], tokens: int, device: torch.device, rounds: int) -> dict[int, float]:
    """The time of backend `ours` over that of "flash", by head dim."""
    found = {}
    for head_dim in head_dims:
        shape = (4, 1, _HEADS, tokens, head_dim)
        *operands, d_out = torch.randn(shape, device=device, dtype=torch.bfloat16).unbind()
        leaves = [x.clone().requires_grad_() for x in operands]

        def contestant(backend: str, leaves=leaves, d_out=d_out):
            def run(number: int) -> object:
                out = tritonattn.attention(*leaves, scaling="log_key_count", causal=True, backend=backend)
                return torch.autograd.grad(out, leaves, d_out)

            return run

        taken = take_turns({name: contestant(name) for name in (ours, "flash")}, device, rounds)
        found[head_dim] = median_ratio(taken[ours], taken["flash"])
    return found


def errors(name: str, scaling: tritonattn.Scaling, tokens: int, head_dim: int) -> list[list]:
    """The largest error over the largest exact value, of causal bf16 with a gain of 1: folded, and factors in fp32."""
    worst: dict[str, list[float]] = {}
    for seed in range(_SEEDS):
        for result, found in _errors(scaling, tokens, head_dim, seed).items():
            worst[result] = [max(pair) for pair in zip(found, worst.get(result, found), strict=True)]
    return [
        [name, head_dim, result if result == "out" else f"gradient of {result}", *(f"{error:.4f}" for error in found)]
        for result, found in worst.items()
    ]


def _errors(scaling: tritonattn.Scaling, tokens: int, head_dim: int, seed: int) -> dict[str, list[float]]:
    sizes = {"batch": 1, "kv_heads": 2, "group": 1, "q_len": tokens, "k_len": tokens, "seed": seed}
    tensors = harness.inputs(
        torch.bfloat16, torch.device("cpu"), **sizes, head_dim=head_dim, value_dim=head_dim, scales=("gain",)
    )
    tensors["gain"] = torch.ones_like(tensors["gain"])
    with pytest.MonkeyPatch.context() as patch:
        stand_in.install(patch, "flash-attn-4 4.0.0b36")
        found = harness.ours_exact_eager(tensors, tritonattn.attention, backend="flash", scaling=scaling, causal=True)
    folded, exact, in_fp32 = found
    return {
        result: [((x[result].double() - right).abs().max() / right.abs().max()).item() for x in (folded, in_fp32)]
        for result, right in exact.items()
    }


def write(library: str, target: Target) -> str:
    """Name a library in the user's table of a card, or none by ""; return the file."""
    path = lookup.user_table(target)

    def named() -> Table:
        try:
            before = lookup.usable_table(path, target)
        except (FileNotFoundError, TableError):
            before = Table(table_name(target), target, kernels_fingerprint(), {})
        return replace(before, faster=library)

    write_table(path, named)
    lookup.clear_cache()
    return str(path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cuda", "emulate"), default="cuda", help="emulate: nothing to time")
    parser.add_argument("--errors", action="store_true", help="errors of folded factors; needs no GPU")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        metavar="N",
        help="half of them for the checks (default: as long as it takes)",
    )
    parser.add_argument("--write", action="store_true", help="let the table of this card name the library or none")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    if options.errors:
        rows = [row for name, scaling in SCALINGS.items() for row in errors(name, scaling, _TOKENS_OF_ERRORS, 64)]
        print(
            f"Largest error over the largest value: {_SEEDS} draws of standard normal q, k and v, {_TOKENS_OF_ERRORS:,}"
            f" tokens, causal, bf16. Measured on a CPU, torch {torch.__version__}, commit {commit()},"
            " `python -m perf flash --errors`.\n"
        )
        print(tabulate(rows, ["scaling", "D", "result", "folded into q", "in fp32"], "github", disable_numparse=True))
        return
    if reason := obstacle(options.device):
        sys.exit(f"flash: {reason}")
    compare(torch.device("cuda", torch.cuda.current_device()), 60 * options.minutes, options.write)


def compare(device: torch.device, seconds: float, writes: bool) -> None:
    """Check and time; name the library in the table of this card if asked to, and exit where a call is wrong."""
    found = libraries(card_of(device))
    checked = [row for one in found for row in flash_checks.check(one, device, seconds / 2 / len(found))]
    print(tabulate(checked, ["library", "call", "gradients and results"], "github", disable_numparse=True), end="\n\n")
    wrong = flash_checks.wrong(checked)
    library = found[0].name
    ratios = gains("triton", HEAD_DIMS, _TOKENS, device, _ROUNDS)
    state = ", ".join(f"{name} {value}" for name, value in card_state(device).items())
    print(f"measured on {torch.cuda.get_device_name()}, {state}; torch {torch.__version__}, commit {commit()}\n")
    rows = [[head_dim, f"{gain:.3f}"] for head_dim, gain in ratios.items()]
    print(tabulate(rows, ["D", f"time of triton over {library}"], "github", disable_numparse=True))
    if writes:
        chosen = library if min(ratios.values()) >= LEAST_GAIN and library not in wrong else ""
        print(f'\n{write(chosen, Target.of(device))}: "auto" takes {chosen or "the kernels"}')
    if wrong:
        sys.exit(f"flash: wrong results of {', '.join(wrong)}")
