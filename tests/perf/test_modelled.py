"""Modelled milliseconds next to measured ones, and the order in which a card's programs end."""

from types import SimpleNamespace

import pytest
import torch

from perf.__main__ import main
from perf.cases.records import read
from perf.models import fill, modelled
from perf.models.replay.times import LAUNCH
from tests.support.versions import skip_without_stub
from tritonattn.core.visibility import Visibility
from tritonattn.tuning import TileConfig
from tritonattn.tuning.gpus import GPUS


def _arguments(q_len, k_len, heads=6, group=3, **given):
    """Facts of a launch about its masks."""
    masks = {name: given.pop(name, None) for name in "key_lengths key_ranges q_starts k_starts".split()}
    sizes = {"q_len": q_len, "k_len": k_len, "q_heads": heads, "group": group, "first_head": 0}
    q = SimpleNamespace(ptr=torch.empty(1, heads, q_len, 64, device="meta"))
    return {"left": None, "right": None, "masks": SimpleNamespace(**masks)} | sizes | {"q": q} | given


MASKS = {
    "full": {},
    "causal": {"right": 0},
    "window": {"left": 20, "right": 5},
    "lengths": {"key_lengths": torch.tensor([33])},
    "ranges": {"key_ranges": torch.tensor([[[i // 2, 40 + i // 3] for i in range(90)]])},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("q_len", "k_len"), [(70, 70), (40, 90), (90, 40)])
def test_blocks_that_a_tile_meets(q_len, k_len, mask):
    config, given = TileConfig(32, 16, 4, 2), dict(MASKS[mask])
    if mask == "ranges":
        given["key_ranges"] = given["key_ranges"][:, :q_len].clamp(max=k_len)
    wanted = Visibility(1, 6, 2, q_len, k_len, torch.device("cpu"), **given)
    seen = wanted.dense()[0, 0]
    padded = torch.nn.functional.pad(seen, (0, -k_len % 16, 0, -q_len % 32))
    tiles = padded.unflatten(0, (-1, 32)).unflatten(2, (-1, 16)).any(3).any(1)  # [blocks of rows, blocks of keys]
    for kernel, counts in (("forward", tiles.sum(1)), ("grad_key_value", 3 * tiles.sum(0))):
        found = modelled._iterations(kernel, config, _arguments(q_len, k_len, **given))
        assert list(found.values()) == counts.tolist()


@pytest.mark.slow
def test_a_sweep_prints_them(tmp_path, capsys):
    """A forward is replayed, decoding is bounded by the card's memory, fp32 by its FFMA."""
    skip_without_stub()
    file = tmp_path / "a.jsonl"
    options = "--quick --lengths 32 --head-dims 16 --rounds 1 --peers sdpa --scalings sqrt_dim --dtypes bf16,fp32"
    main(["sweep", "--suite", "forward,decode", "--device", "emulate", "--json", str(file), *options.split()])
    assert "ms, modelled" in capsys.readouterr().out
    records = read(file)
    found = {(one.suite, one.axes["dtype"]): one.modelled_ms for one in records if one.contestant.startswith("trit")}
    a100 = next(gpu for gpu in GPUS if gpu.name == "a100")
    sizes = {one.axes["dtype"]: one.axes["cache_bytes"] for one in records if one.suite == "decode"}
    for dtype, size in sizes.items():
        assert found["decode", dtype] == size / a100.bandwidth / 1e9
    assert 0 < found["forward", "fp32"] < 1e-3
    assert LAUNCH / 1410 < 1000 * found["forward", "bf16"] < 20 * LAUNCH / 1410
    assert not any(one.modelled_ms for one in records if not one.contestant.startswith("trit"))


FULL = 0.9


@pytest.mark.parametrize("card", fill.CARDS)
def test_few_rows_fill_a_card(card):
    """From 17 to 1,024 rows over 8,192 to 131,072 keys: where less is full, any count that fills more ends no earlier.

    Unsplit, a twelfth to a quarter is full at up to 128 rows.
    """
    target = fill.target_of(card)
    config = fill.config_of("forward", 128, target)
    least = {}
    for keys in (8192, 16384, 65536, 131072):
        for rows in (17, 128, 200, 512, 900, 1024):
            before, after = fill.forward(rows, keys, config, target)
            least[keys] = min(least.get(keys, 1.0), after.share)
            assert after.end <= before.end
            if after.share < FULL:
                others = (fill.of_keys(rows, keys, count, config, target) for count in range(1, 17))
                assert all(other.end >= 0.99 * after.end for other in others if other.share >= FULL), (rows, keys)
            if rows <= 128:
                assert before.share < 0.25 < 0.85 < after.share
    assert min(least[65536], least[131072]) >= FULL
    assert min(least.values()) >= 0.79
    before, after = fill.gradients(2048, 1, True, fill.config_of("grad_key_value", 128, target), target)
    assert before.share < 0.2 < FULL <= after.share
