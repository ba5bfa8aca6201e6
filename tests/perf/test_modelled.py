"""Modelled milliseconds beside measured ones: which calls have them, and what they are made of."""

from types import SimpleNamespace

import pytest
import torch

from perf import modelled
from perf.__main__ import main
from perf.records import read
from perf.replay.times import LAUNCH, LOOPS
from perf.schedule import FIXED
from tests.support.versions import skip_without_stub
from tritonattn.backends.triton import KERNELS, launch
from tritonattn.tuning import Problem, Target, TileConfig
from tritonattn.tuning.gpus import GPUS

H100 = Target.parse("sm_90")


@pytest.mark.parametrize("right", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("q_len", "k_len"), [(70, 70), (40, 90), (90, 40)])
def test_blocks_that_a_tile_meets(q_len, k_len, right):
    problem, config = Problem(64, 64, torch.bfloat16, right=right), TileConfig(32, 16, 4, 2)
    q, k = torch.Size((1, 6, q_len, 64)), torch.Size((1, 2, k_len, 64))
    seen = torch.ones(q_len, k_len, dtype=torch.bool).tril(k_len - q_len if right else k_len)
    padded = torch.nn.functional.pad(seen, (0, -k_len % 16, 0, -q_len % 32))
    tiles = padded.unflatten(0, (-1, 32)).unflatten(2, (-1, 16)).any(3).any(1)  # [blocks of rows, blocks of keys]
    for kernel, wanted in (("forward", tiles.sum(1)), ("grad_key_value", 3 * tiles.sum(0))):
        found = [modelled._iterations(kernel, problem, config, block, q, k) for block in range(len(wanted))]
        assert found == wanted.tolist()


def test_clocks_are_those_of_the_last_tile(monkeypatch):
    """Of 4 heads and 3 blocks, 2 heads side by side, on 2 processors that hold 2 programs each."""
    monkeypatch.setattr(modelled, "_replayed", lambda *_: SimpleNamespace(clocks=1000, programs=2))
    kind = SimpleNamespace(problem=Problem(64, 64, torch.bfloat16, right=True), codes={})

    class Arguments(dict):
        pass

    arguments = Arguments(
        q=SimpleNamespace(ptr=torch.empty(1, 4, 96, 64)), k=SimpleNamespace(ptr=torch.empty(1, 4, 96, 64))
    )
    arguments.kind = kind
    one = launch.Launch(KERNELS["forward"], (2, 3, 2), arguments, TileConfig(32, 32, 4, 2))
    # 3 3 2 2 | 1 1 of the first section, 3 3 .. of the second: processors end at 2 + 1 + 2 + 1, 3 + 3, ...
    steps = [3, 3, 2, 2, 1, 1, 3, 3, 2, 2, 1, 1]
    ends = [0, 0, 0, 0]
    for step in steps:
        ends[ends.index(min(ends))] += FIXED + step
    assert modelled._clocks(one, H100, 2) == LAUNCH + max(ends) * 1000 * LOOPS


def test_a_sweep_prints_them(tmp_path, capsys):
    """A forward is replayed, decoding is bounded by the card's memory, fp32 has no model."""
    skip_without_stub()
    file = tmp_path / "a.jsonl"
    options = "--quick --lengths 32 --head-dims 16 --rounds 1 --peers sdpa --scalings sqrt_dim --dtypes bf16,fp32"
    main(["sweep", "--suite", "forward,decode", "--device", "emulate", "--json", str(file), *options.split()])
    assert "ms, modelled" in capsys.readouterr().out
    records = read(file)
    found = {(one.suite, one.axes["dtype"]): one.modelled_ms for one in records if one.contestant.startswith("trit")}
    assert found["forward", "fp32"] is found["decode", "fp32"] is None
    a100 = next(gpu for gpu in GPUS if gpu.name == "a100")
    size = next(one.axes["cache_bytes"] for one in records if one.suite == "decode" and one.axes["dtype"] == "bf16")
    assert found["decode", "bf16"] == size / a100.bandwidth / 1e9
    assert LAUNCH / 1410 < 1000 * found["forward", "bf16"] < 20 * LAUNCH / 1410
    assert not any(one.modelled_ms for one in records if not one.contestant.startswith("trit"))
