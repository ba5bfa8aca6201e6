"""Find out within a minute whether kernels run on this machine and are right; where not, say what to do.

The machine's compiler and driver, then a call of each dtype with its gradients against float64, by pointers and by
tensor descriptors, then the launch of every kernel, then the bits of batch_invariant. The first thing that is wrong
ends it.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

import tritonattn
from tests.kernels import derivatives, harness
from tritonattn.backends.triton import KERNELS, append_keys, append_to_pages, attention, grids, launch
from tritonattn.tuning.config import Target, legal_reasons
from tritonattn.tuning.defaults import default_config
from tritonattn.tuning.ptxas import ptxas_version, suspicion

from ..devices import kernels_on, obstacle
from ..soak.invariance_cases import Case, differences

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Wrong(Exception):
    """Nothing else is worth trying here; the text says what to do."""


def check_compiler() -> str:
    """Triton compiles its launcher in C, against Python's headers."""
    named = os.environ.get("CC")
    compiler = shutil.which(named) if named else shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        wanted = f"CC={named}, which is not there" if named else "neither gcc nor clang on PATH"
        raise Wrong(f"C compiler: {wanted}: Triton launches nothing without one. apt-get install gcc, or set CC")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not headers.exists():
        raise Wrong(f"Python's headers: expected {headers}: apt-get install python3-dev, or a Python that has them")
    return f"{compiler}, {headers}"


def check_driver(library: str = "libcuda.so.1") -> str:
    """A driver runs code of its major release of CUDA, and of older ones."""
    if not _ptxas():
        return "not NVIDIA's"
    driver, version = ctypes.CDLL(library), ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        raise Wrong("driver: cuDriverGetVersion failed: is the card visible? nvidia-smi says more")
    has, used = version.value // 1000, _ptxas()
    if has < int(used.split(".")[0]):
        raise Wrong(
            f"driver: it knows CUDA {has}, and ptxas {used} makes code for a later one: install a newer driver, or set "
            "TRITON_PTXAS_PATH and TRITON_PTXAS_BLACKWELL_PATH to an older ptxas (pip install nvidia-cuda-nvcc)"
        )
    return f"CUDA {has}.{version.value % 1000 // 10}"


def check_ptxas() -> str:
    """A version that is known for wrong code is a warning: if a later check fails, it is the first suspect."""
    return suspicion(_ptxas()) or _ptxas() or "none"


def _ptxas() -> str:
    """The version for the current device; "" on AMD."""
    return "" if torch.version.hip else ptxas_version(int(Target.of(torch.device("cuda")).arch))


def check_results(device: torch.device) -> str:
    """Each dtype with every gradient, against float64."""
    done = []
    for dtype in DTYPES:
        for descriptors in (False, True):
            with _watched(descriptors) as launches:
                tensors = harness.inputs(dtype, device, q_len=70, k_len=150, head_dim=64, value_dim=64)
                attempt(f"{dtype}, descriptors {descriptors}", lambda x=tensors: harness.check(x, causal=True))
            if descriptors == any(config.descriptors for _, config in launches):
                done.append(f"{str(dtype).removeprefix('torch.')} by {'descriptors' if descriptors else 'pointers'}")
    return ", ".join(done)


def check_every_kernel(device: torch.device) -> str:
    """Each kernel launches, in calls whose results are held to float64."""
    with _watched(None) as launches:
        attempt("every form", lambda: _every_form(device))
        attempt("splits", lambda: _splits(device))
        attempt("decoding", lambda: _decode(device))
        attempt("pages", lambda: _pages(device))
        attempt("tangents and their gradients", lambda: _second(device))
    missing = set(KERNELS.values()) - {kernel for kernel, _ in launches}
    if missing:
        raise Wrong(f"kernels: {', '.join(kernel.__name__ for kernel in missing)} did not launch")
    return f"{len(KERNELS)} kernels in {len(launches)} launches"


def _every_form(device: torch.device) -> None:
    ranges = torch.tensor([[0, 40], [5, 53]], dtype=torch.int32)[:, None].repeat(1, 37, 1)
    options = {"key_ranges": ranges.to(device), "softcap": 2.0, "return_aux": True}
    for scaling in ("key_norm_sum", "key_norm_max"):
        tensors = harness.inputs(torch.bfloat16, device, q_len=37, k_len=53, scales=("sinks",))

        def attend(q, k, v, sinks, scaling=scaling, **named):
            return tritonattn.attention(q, k, v, sinks=sinks, scaling=scaling, **named)

        harness.check(tensors, attend, **options)


def _splits(device: torch.device) -> None:
    """Keys and rows in two parts each, which larger calls take by themselves, with every gradient."""
    tensors = harness.inputs(torch.bfloat16, device, q_len=200, k_len=150, head_dim=64, value_dim=64)
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(attention, "_kept", attention._kept.__wrapped__))
        for name in ("splits_of_keys", "splits_of_rows"):
            patches.enter_context(mock.patch.object(grids, name, return_value=2))
        harness.check(tensors, causal=True)


def _second(device: torch.device) -> None:
    for form in ("capped", "pairs"):
        derivatives.case_of(derivatives.FORMS[form], device, torch.bfloat16, (32, 32), (37, 53)).check()


def check_invariance(device: torch.device) -> str:
    """Under batch_invariant, results against float64, and the bits of a sequence alone and with the rest of a batch."""
    with _watched(None) as launches:
        attempt("batch_invariant", lambda: _invariant(device))
    return f"{len(launches)} launches"


def _invariant(device: torch.device) -> None:
    scaling = "key_norm_mean"
    tensors = harness.inputs(torch.bfloat16, device, q_len=37, k_len=53, head_dim=64, value_dim=64)
    options = {"scaling": scaling, "causal": True, "return_aux": True}
    harness.check(tensors, tritonattn.attention, **options, batch_invariant=True)
    for batch in ("packed", "paged"):
        case = Case(batch, "bf16", (64, 64), scaling, "causal", (1, 2), None, False, length=40, seed=0)
        with device:
            differing = differences(case, "triton")
        assert not differing, f"{batch}: other bits of {', '.join(differing)} than alone"


def _decode(device: torch.device) -> None:
    """Two splits of the keys, with a record of the keys that a kernel fills."""
    q, k, v = (torch.randn(1, heads, 600, 64, device=device).bfloat16() for heads in (4, 2, 2))
    statistics = tritonattn.KeyStatistics(1, 2, 600, device=device)
    append_keys(k, None, statistics._buffers())
    lengths = torch.tensor([600], device=device)
    found = tritonattn.attention_decode(
        q[:, :, -1:], k, v, key_lengths=lengths, scaling="key_norm_mean", statistics=statistics, backend="triton"
    )
    doubles = (x.double() for x in (q[:, :, -1:], k, v))
    exact = tritonattn.attention(*doubles, scaling="key_norm_mean", causal=True, backend="reference")
    torch.testing.assert_close(found.double(), exact, rtol=0.05, atol=0.01)


def _pages(device: torch.device) -> None:
    """The newest rows of two sequences in pages, with a record of the keys that a kernel fills."""
    k, v = (torch.randn(6, 32, 2, 64, device=device).bfloat16() for _ in range(2))
    q, lengths = torch.randn(24, 4, 64, device=device).bfloat16(), (40, 64)
    table, row_ends, key_ends = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in ([[4, 0], [2, 5]], [0, 8, 24], [0, 40, 104])
    )
    keys, values = (
        torch.cat([x[pages].flatten(0, 1)[:n] for pages, n in zip(table.long(), lengths, strict=True)]) for x in (k, v)
    )
    statistics = tritonattn.PagedKeyStatistics(6, 32, 2, device=device)
    append_to_pages(keys, key_ends, key_ends.diff(), table, statistics.buffers)
    ends, options = (row_ends, key_ends, 16, 64), {"scaling": "key_norm_mean", "causal": True}
    found = tritonattn.attention_varlen(
        q, k, v, *ends, block_table=table, statistics=statistics, backend="triton", **options
    )
    exact = tritonattn.attention_varlen(*(x.double() for x in (q, keys, values)), *ends, backend="reference", **options)
    torch.testing.assert_close(found.double(), exact, rtol=0.05, atol=0.01)


@contextmanager
def _watched(descriptors: bool | None) -> Iterator[list]:
    """The launches inside, as (kernel, config), with default configs that load by descriptors, or by pointers."""

    def config_for(kernel, problem, target):
        chosen = default_config(kernel, problem, target)
        asked = replace(chosen, descriptors=chosen.descriptors if descriptors is None else descriptors)
        return replace(asked, descriptors=False) if legal_reasons(kernel, asked, problem, target) else asked

    def watch(kernel, grid, arguments, config) -> None:
        seen.append((kernel, config))
        run(kernel, grid, arguments, config)

    seen, run, before = [], launch.run, launch.config_for
    launch.run, launch.config_for = watch, config_for
    try:
        yield seen
    finally:
        launch.run, launch.config_for = run, before


def attempt(what: str, call: Callable[[], object]) -> None:
    """Call; whatever goes wrong names the suspects."""
    try:
        call()
    except AssertionError as error:
        note = suspicion(_ptxas())
        raise Wrong(
            f"{what}: a wrong result: {error}. Repeat it under `python -m perf sanitize`{f'; {note}' if note else ''}"
        ) from error
    except Exception as error:
        raise Wrong(
            f"{what}: {type(error).__name__}: {str(error).strip()[:500]}. CUDA_LAUNCH_BLOCKING=1 names the launch;"
            " TRITON_CACHE_DIR=$(mktemp -d) rules out an old cache"
        ) from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cuda", "emulate"), default="cuda", help="emulate: on a stub driver")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print each check as it passes; exit with what to do where one does not."""
    if reason := obstacle(options.device):
        sys.exit(f"preflight: {reason}; nvidia-smi shows what the driver finds")
    with kernels_on(options.device, capability=90) as device:
        checks: dict[str, Callable[[], str]] = {
            "compiler": check_compiler,
            "ptxas": check_ptxas,
            "driver": check_driver,
            "results": lambda: check_results(device),
            "kernels": lambda: check_every_kernel(device),
            "invariance": lambda: check_invariance(device),
        }
        for name, check in checks.items():
            start = time.monotonic()
            try:
                found = check()
            except Wrong as wrong:
                sys.exit(f"preflight: {wrong}")
            print(f"{name}: {found} ({time.monotonic() - start:.0f} s)", flush=True)
    print("kernels run here, and are right")
