"""Run the test of a fault on a copy of the package that has it."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .table import ROOT, Mutant

_COPIED = ("tritonattn", "tests", "perf", "autotune_cache")
# Where pytest says at the end of a failure which error a line raised; or where the trace of a rank ends.
_ASSERTED = re.compile(r"^(\S+:\d+: (AssertionError|Failed|GradcheckError)|E +AssertionError.*)$", re.MULTILINE)


@contextmanager
def checkout_copy() -> Iterator[Path]:
    """A temporary copy of the package, its tests and their settings."""
    with tempfile.TemporaryDirectory(prefix="tritonattn-mutants-") as name:
        folder = Path(name)
        for part in _COPIED:
            shutil.copytree(ROOT / part, folder / part)  # with compiled files, which stay valid
        shutil.copy(ROOT / "pyproject.toml", folder)
        yield folder


def run_tests(folder: Path, tests: Sequence[str], interpreted: bool) -> subprocess.CompletedProcess:
    """Run tests on the copy in a folder, up to the first failure."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment |= {"TRITON_INTERPRET": str(int(interpreted)), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def why_sound_fails(mutants: Sequence[Mutant]) -> str | None:
    """The output of the faults' tests on the package as it is; None where all pass."""
    with checkout_copy() as folder:
        for interpreted in (True, False):
            tests = {mutant.test for mutant in mutants if mutant.is_interpreted == interpreted}
            if tests:
                done = run_tests(folder, sorted(tests), interpreted)
                if done.returncode != 0:
                    return done.stdout + done.stderr
    return None


def why_not_caught(mutant: Mutant) -> str | None:
    """The output of a fault's test where it does not fail by an assertion; None where it does."""
    with checkout_copy() as folder:
        path = folder / mutant.path
        path.write_text(mutant.applied(path.read_text(encoding="utf-8")), encoding="utf-8")
        done = run_tests(folder, [mutant.test], mutant.is_interpreted)
    is_caught = done.returncode == 1 and _ASSERTED.search(done.stdout)
    return None if is_caught else done.stdout + done.stderr
