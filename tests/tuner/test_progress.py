"""Progress where tqdm is not installed."""

from __future__ import annotations

from types import SimpleNamespace

from tritonattn.tuner import progress


def test_a_line_now_and_then(monkeypatch, capsys):
    """When more than ten seconds have passed since the last."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with progress.Lines(total=24, unit="kernel", desc="sm_80") as lines:
        for _ in range(24):
            now[0] += 1.0
            lines.update()
    assert capsys.readouterr().err.splitlines() == [f"sm_80 {count}/24 kernel" for count in (11, 22, 24)]
