"""The soak's command: what it needs, what it prints of a failure, and a short one in Triton's interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_in_the_interpreter():
    command = (sys.executable, "-m", "perf", "soak", "--device", "cpu", "--trials", "1", "--seed", "183")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"1 calls, \d+ launches: every result within the bound, and the same twice", done.stdout.splitlines()[-1]
    )
