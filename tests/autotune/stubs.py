"""Stubs for tests of the commands: a compiler that compiles nothing, and a few keys."""

import triton

from tritonattn.autotune.gate import Candidate, Code
from tritonattn.cli import main as cli
from tritonattn.tuning.config import Target, TileConfig
from tritonattn.tuning.table import Entry, Key

ONE = ["tune", "--static", "a100", "--kernels", "forward", "--head-dims", "64", "--lengths", "long"]
KEYS = [Key("forward", 64, scales, "long") for scales in ("none", "query", "query+key")]
BEST = TileConfig(64, 64, 4, 2)
MEASURED = Entry(BEST, "measured", {"triton": triton.__version__, "rounds": 20, "milliseconds": 1.0})
H100 = Target("cuda", "90", "NVIDIA H100 80GB HBM3")
SEARCH = ["tune", *ONE[3:]]


class FakeCompiler:
    """Only BEST passes the gate."""

    def __init__(self, target, workers, examine=None):
        self.target = target

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def examine(self, wanted, progress=None):
        code = Code(128, 0, 32768)
        return [Candidate(config, code, () if config == BEST else ("spills",)) for _, _, config in wanted]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = cli.main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err
