"""A test of the tests: deliberate faults in the kernels, each of which some kernel test must catch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]

# Name: file, the line as it stands, the line with the fault, and the tests that must fail.
MUTANTS = {
    "a mask edge is dropped": (
        "kernels/primitives.py",
        "keep = offs_key[None, :] < hi[:, None]",
        "keep = offs_key[None, :] <= hi[:, None]",
        "test_attention.py::test_every_mask_and_scale[causal-constant-torch.float32]",
    ),
    "the gradient of the keys' lengths is forgotten": (
        "kernels/key_statistics.py",
        "d_length = tl.load(d_lengths_ptr + key_offsets, mask=live, other=0.0)",
        "d_length = tl.zeros([BLOCK_N], tl.float32)",
        "test_attention.py::test_every_mode[causal-key_norm_sum]",
    ),
    "the scale is rounded into q": (
        "kernels/forward.py",
        "factor = tl.abs(factor)",
        "q, factor = (q * tl.abs(factor)[:, None]).to(q.dtype), tl.full([BLOCK_M], 1.0, tl.float32)",
        "test_attention.py::test_scales_act_on_the_accumulated_product_in_fp32",
    ),
}


def _run_kernel_tests(package_parent: Path, *tests: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(package_parent), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/kernels/{test}" for test in tests]
    return subprocess.run(command, cwd=package_parent, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the package, its tests and their settings, in which all the tests pass."""
    folder = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("tritonattn", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    sound = _run_kernel_tests(folder, *(test for *_, test in MUTANTS.values()))
    assert sound.returncode == 0, sound.stdout + sound.stderr
    return folder


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_is_caught(name, copy):
    file, line, fault, test = MUTANTS[name]
    path = copy / "tritonattn" / file
    source = path.read_text()
    assert source.count(line) == 1, f"{file}: expected the line {line!r} once, got it {source.count(line)} times"
    path.write_text(source.replace(line, fault))
    broken = _run_kernel_tests(copy, test)
    path.write_text(source)
    assert broken.returncode == 1, broken.stdout + broken.stderr
    assert "1 failed" in broken.stdout
    assert "AssertionError" in broken.stdout
