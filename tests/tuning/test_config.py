"""Targets, the classes of a problem, and what tiles take of shared and of tensor memory."""

from types import SimpleNamespace

import torch

from tritonattn.tuning import config
from tritonattn.tuning.config import Problem, Target, TileConfig, is_short, legal_reasons

HALF, FULL = torch.float16, torch.float32
SM_80, SM_90, SM_100, GFX942 = map(Target.parse, ("sm_80", "sm_90", "sm_100", "gfx942"))


def reasons(tiles: TileConfig, target: Target, kernel: str = "forward", dim: int = 128, dtype=HALF) -> list[str]:
    return legal_reasons(kernel, tiles, Problem(dim, dim, dtype), target)


def test_a_target_is_that_of_the_device_meant(monkeypatch):
    cards = {0: ("Card A", (8, 6), 84), 1: ("Card B", (9, 0), 132)}
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: cards[index][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: cards[index][1])
    properties = {index: SimpleNamespace(multi_processor_count=card[2]) for index, card in cards.items()}
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    config._target_of.cache_clear()
    found = [Target.of(torch.device(name)) for name in ("cuda:0", "cuda:1", "cuda", "cpu")]
    config._target_of.cache_clear()
    second = Target("cuda", "90", "Card B", 132)
    assert found == [Target("cuda", "86", "Card A", 84), second, second, SM_80]


def test_short_calls_have_at_most_1024_rows_and_keys():
    lengths = ((1024, 1024), (1, 1024), (1025, 1), (1, 1025))
    assert [is_short(*each) for each in lengths] == [True, True, False, False]


def test_tiles_may_fill_the_memory_there_is():
    assert reasons(TileConfig(64, 32, 4, 4), GFX942) == [], "65,536 bytes"
    [reason] = reasons(TileConfig(64, 32, 4, 5), GFX942)
    assert "tiles need at least 81920 bytes of shared memory, gfx942 has 65536" in reason
    assert reasons(TileConfig(128, 256, 8, 1), SM_100) == [], "512 columns"
    [reason] = reasons(TileConfig(128, 256, 16, 1), SM_100, kernel="grad_query", dim=64)
    assert "tiles need 704 columns of tensor memory, sm_100 has 512" in reason
    assert reasons(TileConfig(128, 64, 32, 2), SM_80) == ["num_warps 32 is not a power of two up to 16"]
    assert reasons(TileConfig(64, 32, 4, 2, split_blocks=3), SM_80, "decode") == ["split_blocks 3 is below 4"]
    assert reasons(TileConfig(64, 32, 4, 2, l2_percent=0), SM_80) == ["l2_percent 0 is below 1"]
    described = TileConfig(64, 32, 4, 2, descriptors=True)
    assert reasons(described, SM_90) == reasons(described, Target.parse("sm_120")) == []
    for target, dtype in ((SM_80, HALF), (Target.parse("sm_89"), HALF), (SM_90, FULL), (GFX942, HALF)):
        assert "descriptors need" in reasons(described, target, dtype=dtype)[0]
