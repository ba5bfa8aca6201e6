"""`tritonattn env` on a machine with several GPUs."""

import pytest
import torch

pytest.importorskip("triton")
from tritonattn.tuner import in_use
from tritonattn.tuner.static import keys
from tritonattn.tuning import cache_dir, lookup
from tritonattn.tuning.config import Target


def test_every_gpu_is_named_with_its_clocks_and_tables(tmp_path, monkeypatch):
    cards = [Target("cuda", "80", "NVIDIA A100-SXM4-80GB"), Target("cuda", "90", "NVIDIA H100 80GB HBM3")]
    monkeypatch.setenv("TRITONATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(Target, "of", classmethod(lambda cls, device: cards[device.index]))
    monkeypatch.setattr(in_use, "card_state", lambda device: {"driver_version": f"57{device.index}"})
    lookup.clear_cache()
    facts = in_use.kernel_facts()
    count = len(list(keys()))
    for index, (card, name) in enumerate(zip(cards, ("a100", "h100"), strict=True)):
        assert facts[f"GPU {index}"] == f"{card.card}, {card.name}"
        assert facts[f"GPU {index} driver_version"] == f"57{index}"
        assert facts[f"GPU {index} ptxas"].removeprefix("ptxas ").startswith(("12.", "13."))
        assert facts[f"GPU {index} {tmp_path / 'autotune' / name}.json"] == "no such file"
        shipped = cache_dir.shipped_tables() / f"{name}.json"
        assert facts[f"GPU {index} {shipped}"] == f"{count} entries, {count} of {count} in use"
        assert facts[f"GPU {index} defaults"] == f"0 of {count} in use"
    assert facts["user cache"] == str(tmp_path)
