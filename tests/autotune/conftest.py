"""Machines for the commands. Imports are inside, since triton may be missing."""

from dataclasses import replace

import pytest
import torch


@pytest.fixture
def user(tmp_path, monkeypatch):
    """The folder of the user's tables; none is shipped."""
    from tritonattn.autotune import tune
    from tritonattn.backends.triton import launch
    from tritonattn.tuning import cache_dir, lookup

    from .stubs import FakeCompiler

    (tmp_path / "shipped").mkdir()
    monkeypatch.setattr(cache_dir, "shipped_tables", lambda: tmp_path / "shipped")
    monkeypatch.setenv("TRITONATTN_CACHE_DIR", str(tmp_path / "user"))
    monkeypatch.setattr(tune, "Compiler", FakeCompiler)
    monkeypatch.setattr(launch, "interpreting", False)
    lookup.clear_cache()
    yield tmp_path / "user" / "autotune"
    lookup.clear_cache()


@pytest.fixture
def on_h100(user, monkeypatch):
    """A machine with an H100 on which every search finds BEST: the keys searched for, with their sizes."""
    from tritonattn.autotune import tune
    from tritonattn.autotune.search import Result
    from tritonattn.autotune.timing import Timing
    from tritonattn.tuning.config import Target
    from tritonattn.tuning.defaults import default_config

    from .stubs import BEST, H100, MEASURED

    searched = {}

    def search(key, configs, target, device, effort, size, dtypes):
        assert set(configs) <= {BEST}
        assert dtypes == (key.problem.dtype,)
        searched[key] = size
        entry = replace(MEASURED, details=MEASURED.details | {"rounds": effort.rounds})
        before, timing = default_config(key.kernel, key.problem, target), Timing(1.0, 0.9, 1.1, 20)
        return Result(key, before, Timing(2.0, 1.9, 2.1, 20), entry, timing)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(Target, "of", classmethod(lambda cls, device: H100))
    monkeypatch.setattr(tune, "search", search)
    return searched
