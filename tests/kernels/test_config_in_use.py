"""Configs of tables in calls: one that is used, and those that a compiler or a card refuses."""

import warnings

import pytest
import torch
from triton.runtime.errors import OutOfResources

import tritonattn
from tritonattn.backends.triton import launch
from tritonattn.tuning import cache_dir, lookup
from tritonattn.tuning.config import Target, TileConfig
from tritonattn.tuning.gpus import table_name
from tritonattn.tuning.table import Entry, Key, Table, kernels_fingerprint, write_table

TUNED = TileConfig(32, 16, 4, 1)


@pytest.fixture
def ran(device, tmp_path, monkeypatch, launched):
    """A table with TUNED for two kernels, and the launches."""
    target = Target.of(device)
    keys = [Key("forward", 64, "none", "short"), Key("decode", 64, "none", "short")]
    entries = {key: Entry(TUNED if key.kernel == "forward" else TileConfig(16, 16, 2, 1), "static", {}) for key in keys}
    name = table_name(target) or "a100"
    write_table(tmp_path / f"{name}.json", Table(name, target, kernels_fingerprint(), entries))
    monkeypatch.setattr(cache_dir, "shipped_tables", lambda: tmp_path)
    monkeypatch.setattr(cache_dir, "user_cache", lambda: tmp_path / "none")
    lookup.clear_cache()
    launch.forget_plans()
    yield launched
    lookup.clear_cache()
    launch.forget_plans()


def operands(device):
    return torch.randn(3, 1, 2, 40, 64, generator=torch.Generator().manual_seed(0)).to(device, torch.float16)


def refuse(monkeypatch, error: Exception, refused: TileConfig = TUNED) -> None:
    run = launch.run

    def refusing(kernel, grid, arguments, config):
        run(kernel, grid, arguments, config)
        if config == refused:
            raise error

    monkeypatch.setattr(launch, "run", refusing)


@pytest.mark.parametrize(
    "error", [OutOfResources(300000, 166912, "shared memory"), RuntimeError("PassManager::run failed")], ids=repr
)
def test_a_config_that_is_refused_is_named_and_the_default_runs(error, device, ran, monkeypatch):
    refuse(monkeypatch, error)
    q, k, v = operands(device)
    message = rf"skips a tuned config: .*json: forward/64/none/short: .*{type(error).__name__}"
    with pytest.warns(UserWarning, match=message):
        out = tritonattn.attention(q, k, v, backend="triton")
    torch.testing.assert_close(out, tritonattn.attention(q, k, v, backend="reference"), rtol=2e-3, atol=2e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tritonattn.attention(q, k, v, backend="triton")
    assert [config == TUNED for _, config in ran] == [True, False, False]


def test_an_error_of_another_cause_is_raised(device, ran, monkeypatch):
    refuse(monkeypatch, RuntimeError("an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tritonattn.attention(*operands(device), backend="triton")
