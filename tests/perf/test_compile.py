"""`python -m perf compile`: later launches find their code, and what a call raises is reported."""

import pytest
import torch

triton = pytest.importorskip("triton")
from perf import compile as ahead
from tests.support.shells import leave_bodies_out
from tests.support.versions import skip_without_stub
from tritonattn.backends.triton import launch
from tritonattn.tuning.config import Target


@pytest.fixture(autouse=True)
def _kept(monkeypatch) -> None:
    """`compiled` has a process of its own, and replaces how this one launches."""
    skip_without_stub()
    for owner, name in ((launch, "run"), (launch, "config_for"), (Target, "of")):
        monkeypatch.setattr(owner, name, getattr(owner, name))


def test_launches_find_their_code(tmp_path, monkeypatch):
    from tests.stub import DEVICES, installed

    leave_bodies_out(monkeypatch, tmp_path)
    call, configs = next(ahead.calls())
    card = Target("cuda", "90", DEVICES[4][1])
    hits, launches = [], []
    number, errors = ahead.compiled(card, 0, 10**6, 600.0)
    assert errors == []
    monkeypatch.setattr(
        triton.knobs.compilation, "listener", lambda *, cache_hit, **rest: hits.append(cache_hit), raising=False
    )
    monkeypatch.setattr(launch, "config_for", configs)
    with installed().active(90, launches.append), torch.cuda.device(4):
        call()
    assert len({one.kernel.hash for one in launches}) == number
    assert all(hits)
