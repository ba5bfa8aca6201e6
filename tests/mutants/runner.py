"""Run the tests of faults on a copy of the package that has them."""

import compileall
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .table import ROOT, Mutant

SECONDS = 300  # for a test; one that hangs has caught nothing
# Other packages that many of the tests need.
IMPORTED = ("torch", "triton", "hypothesis", "torch._dynamo", "torch.distributed.tensor", "transformers.modeling_utils")
_COPIED = ("tritonattn", "tests", "perf", "autotune_cache")
_FORKER = "tests/mutants/forker.py"
# Without looking for garbage at the end, which would take longer than most tests.
_OPTIONS = ("-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:unraisableexception")
# A kernel with a fault is another than the one that the shipped tables are of.
_OPTIONS += ("-W", "ignore:tritonattn skips a table of tuned configs:UserWarning")
# Where pytest says at the end of a failure which error a line raised; or where the trace of a rank ends.
_ASSERTED = re.compile(
    r"^(\S+:\d+: (AssertionError|Failed|GradcheckError)|E +(AssertionError|Failed)\b.*)$", re.MULTILINE
)


class Runner(NamedTuple):
    """A copy of the checkout in a folder, and a process that forks a pytest there for each line it reads."""

    folder: Path
    forker: subprocess.Popen

    def run(self, tests: Sequence[str]) -> tuple[int, str]:
        """The exit status and the output of tests on the copy, up to the first failure."""
        output, seconds = self.folder / "output.txt", SECONDS * len(tests)
        request = {"arguments": [*_OPTIONS, *tests], "output": str(output), "seconds": seconds}
        print(json.dumps(request), file=self.forker.stdin, flush=True)
        answer = self.forker.stdout.readline()
        if not answer:
            raise RuntimeError(f"{_FORKER}: expected a status, got none")
        status, said = int(answer), output.read_text(encoding="utf-8", errors="replace")
        return status, f"{said}\nstopped after {seconds} s" if status == -signal.SIGALRM else said

    def why_sound_fails(self, mutants: Sequence[Mutant]) -> str | None:
        """The output of the faults' tests on the package as it is; None where all pass."""
        status, output = self.run(sorted({mutant.test for mutant in mutants}))
        return None if status == 0 else output

    def why_not_caught(self, mutant: Mutant) -> str | None:
        """The output of a fault's test where it does not fail by an assertion; None where it does."""
        place = mutant.place(self.folder)
        changed, sound = place.replaced(mutant.fault), place.path.rename(place.path.with_suffix(".sound"))
        try:
            place.path.write_text(changed, encoding="utf-8")
            status, output = self.run([mutant.test])
        finally:
            sound.replace(place.path)
        return None if status == 1 and _ASSERTED.search(output) else output


@contextmanager
def started(interpreted: bool, imported: Sequence[str] = IMPORTED) -> Iterator[Runner]:
    """A runner of tests that are interpreted, or of others; its copy of the checkout goes with it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": str(int(interpreted))}
    # The compiled form of a fault must not stay: the next one in its file may have the same size and time.
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command, pipe = [sys.executable, _FORKER, *imported], subprocess.PIPE
    with checkout_copy() as folder:
        environment["PYTHONPATH"] = str(folder)
        with subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True) as forker:
            yield Runner(folder, forker)


@contextmanager
def checkout_copy() -> Iterator[Path]:
    """A temporary copy of the package, its tests and their settings."""
    with tempfile.TemporaryDirectory(prefix="tritonattn-mutants-") as name:
        folder = Path(name)
        for part in _COPIED:
            shutil.copytree(ROOT / part, folder / part)
        shutil.copy(ROOT / "pyproject.toml", folder)
        compileall.compile_dir(folder, quiet=2)
        yield folder
