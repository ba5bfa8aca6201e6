"""The host's time a step of vLLM's engine spends in an attention layer: ours next to the Triton backend of vLLM.

On a stub of NVIDIA's driver, as `launches`; in the virtual environment of `make test-vllm`.
"""

from __future__ import annotations

import argparse
import os
import statistics
from typing import Any
from unittest.mock import patch

import torch
from tabulate import tabulate

from tritonattn.cli.options import whole_number
from tritonattn.core.provenance import Environment
from tritonattn.core.records import FIGURES

from ..options import command_line
from .launches import in_turn, launches_of

_MODES = ("sqrt_dim", "log_key_count", "key_norm_mean")
# By name: new tokens and keys, new ones included, of every sequence; 8 heads over 2, D = 64, bf16, pages of 16.
STEPS = {
    "decode, 8 sequences": ([1] * 8, [1000 - 100 * i for i in range(8)]),
    "decode of 7, and a chunk of 57": ([1] * 7 + [57], [1000 - 100 * i for i in range(8)]),
}


def layers() -> dict[str, Any]:
    """A layer by its backend and mode."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    from tests.serving.layer import Layer
    from tritonattn.integrations.vllm import plugin

    plugin.register()
    ours = {f"TRITONATTN, {mode}": Layer({"scaling": mode, "backend": "triton"}) for mode in _MODES}
    return {"TRITON_ATTN, sqrt_dim": Layer(None, attn_backend=TritonAttentionBackend), **ours}


def measured(rounds: int, capability: int) -> list[tuple]:
    """Rows of the table: step, layer, microseconds of a first layer beyond another's, and what another layer takes.

    Microseconds are the least of the rounds, another's also their median; then come its launches and torch operators.
    """
    os.environ |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_LOGGING_LEVEL": "ERROR"}
    from triton.backends import backends

    from tests.stub import installed
    from tests.support.device_work import values_unread, work_of_torch
    from tritonattn.backends.triton import launch
    from tritonattn.calls import paged_statistics

    backends["nvidia"].driver.is_active = staticmethod(lambda: True)  # vLLM asks before it imports Triton
    stub, rows = installed(), []
    by_kernel = patch.object(paged_statistics, "launches", lambda *_: True)  # as of a GPU's tensors
    with stub.active(capability), values_unread(), by_kernel, torch.no_grad():
        compared = layers()
        for step, (new, keys) in STEPS.items():
            parts = {name: layer.parts(**layer.batch(new, keys)) for name, layer in compared.items()}
            work = {name: len(work_of_torch(of_layer)) for name, (_, of_layer) in parts.items()}
            counts = {name: launches_of(stub, of_layer) for name, (_, of_layer) in parts.items()}
            noted, launch.run = launch.run, lambda *launched: launch.run_on_device(*launched)
            times = in_turn(rounds, {(name, i): call for name, both in parts.items() for i, call in enumerate(both)})
            launch.run = noted
            for name in compared:
                first, other = times[name, 0], times[name, 1]
                taken = (min(first) - min(other), min(other), statistics.median(other))
                rows.append((step, name, *(f"{x:.0f}" for x in taken), counts[name], work[name]))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=whole_number, default=200, help="default: %(default)s")
    parser.add_argument("--capability", type=whole_number, default=90, help="of the GPU; default: %(default)s")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rows = measured(options.rounds, options.capability)
    where = Environment.of(torch.device("cpu"), command_line("serving", options))
    print(f"Simulated on a stub of NVIDIA's driver: {where}.\n")
    headers = ("step", "backend", "us, once", "us, least", "us, median", "launches", "torch operators")
    print(tabulate(rows, headers, "github", **FIGURES))
