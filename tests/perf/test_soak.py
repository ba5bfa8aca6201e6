"""The soak's command: what it needs, what it prints of a failure, and a short one in Triton's interpreter."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("triton")
from perf import soak
from perf.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Fake:
    """A trial that fails with an error, or passes."""

    seed: int
    error: Exception | None = None
    stages: None = None

    def check(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.fixture
def fakes(monkeypatch):
    """Install trials in place of the drawn ones."""
    monkeypatch.setattr(soak, "obstacle", lambda kind: None)
    return lambda *trials: monkeypatch.setattr(soak, "trials", lambda *_: iter(trials))


def test_a_wrong_result_is_reported_and_the_soak_goes_on(fakes, capsys):
    fakes(Fake(7, AssertionError("out: expected less")), Fake(8), Fake(9, AssertionError("lse: expected less")))
    with pytest.raises(SystemExit, match="3 calls, 0 launches: 2 calls failed"):
        main(["soak", "--device", "cpu", "--bare"])
    reported = capsys.readouterr().err
    assert "AssertionError: out: expected less" in reported
    assert "repeat it: python -m perf soak --device cpu --trials 1 --seed 7 --bare" in reported
    assert "--seed 9" in reported


def test_in_the_interpreter():
    command = (sys.executable, "-m", "perf", "soak", "--device", "cpu", "--trials", "1", "--seed", "183")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"1 calls, \d+ launches: every result within the bound, and the same twice", done.stdout.splitlines()[-1]
    )
