"""Run the test of PyPI's jvp_flash_attention with tritonattn in its place: `python -m tests.peers.jvp_flash_attention`.

Its source distribution is downloaded with pip into a temporary folder; nothing of it is kept. Its test compares
tangents, and gradients of a loss, with PyTorch's math path: full, causal, and under bool and additive masks that hide
nine of ten pairs. --theirs runs it as it is, on a CPU in Triton's interpreter: TRITON_INTERPRET=1, triton below
3.9 and numpy below 2.4, as in the environment of `make test-oldest`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import tritonattn

VERSION = "0.14.0"
CASES = [("none", False), ("none", True), ("boolean", False), ("additive", False)]
LARGEST = 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--theirs", action="store_true", help="run jvp_flash_attention itself")
    parser.add_argument("--backend", default="sdpa", help="of tritonattn (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128, 256, 512], help="of its 32 to 2048")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        suite: Any = tests_in(Path(folder))
        if not options.theirs:
            suite.JVPAttn = SimpleNamespace(fwd_dual=lambda *x, **masks: attend(*x, **masks, backend=options.backend))
        errors = [largest_error(suite, length, *case) for length in options.lengths for case in CASES]
    return int(max(errors) > LARGEST)


def attend(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None, causal: bool, backend: Any) -> Tensor:
    masks: dict[str, Any] = {}
    if attn_mask is not None:
        masks = {"mask" if attn_mask.dtype == torch.bool else "bias": attn_mask}
    return tritonattn.attention(q, k, v, causal=causal, backend=backend, **masks)


def tests_in(folder: Path) -> ModuleType:
    """Its test, as a module, from the source distribution in folder."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(folder), f"jvp_flash_attention=={VERSION}"], check=True)
    archive = next(folder.glob("*.tar.gz"))
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    root = folder / archive.name.removesuffix(".tar.gz")
    sys.path[:0] = [str(root), str(root / "tests")]
    import test_jvp_attention  # pyright: ignore[reportMissingImports]

    return test_jvp_attention


def largest_error(suite: Any, length: int, mask_type: str, causal: bool) -> float:
    """The largest difference from PyTorch of the output, its tangent and the gradients, in fp32; inf for NaN."""
    cpu, arguments = torch.device("cpu"), suite.Args(2, 128, 64)
    *operands, target = suite.create_test_tensors(arguments, length, cpu, torch.float32)
    mask = suite.create_attention_mask(arguments, length, cpu, torch.float32, mask_type)
    q, d_q, k, d_k, v, d_v = operands
    found = suite.validate_accuracy_and_gradients(q, k, v, d_q, d_k, d_v, target, causal, attn_mask=mask)
    names = ("primal_error", "tangent_error", "q_grad_error", "k_grad_error", "v_grad_error")
    largest = max(torch.inf if x != x else x for x in (getattr(found, name) for name in names))
    print(f"length {length}, mask {mask_type}, causal {causal}: {largest:.1e}", flush=True)
    return largest


if __name__ == "__main__":
    sys.exit(main())
