"""Watch a training run with Monitor; QK-clip takes a head back when its logits pass a threshold, else they stay."""

import json
import tempfile
from pathlib import Path

import torch
from torch import nn

import tritonattn
from tritonattn.analysis import Monitor, Thresholds, qk_clip

LIMIT = 30.0
LIMITS = Thresholds(max_logit=LIMIT, near_one_hot=None, near_uniform=None)


def run(file, clips):
    """Train a layer whose head 1 is in trouble, and return what Monitor wrote."""
    torch.manual_seed(0)
    layer = tritonattn.nn.ScaledAttention(64, heads=4, causal=True)
    model = nn.ModuleDict({"embed": nn.Linear(16, 64), "attention": layer, "head": nn.Linear(64, 16)})
    with torch.no_grad():
        layer.q_proj.weight[16:32] *= 60
    optimizer, clip = torch.optim.AdamW(model.parameters(), lr=1e-3), qk_clip(model, threshold=LIMIT)

    def act(alarms):
        for name, gamma in clip(alarms).items():
            print(f"step {alarms[0].step}: {name} clipped by {[round(g, 2) for g in gamma.tolist()]}")

    with Monitor(model, every=2, file=file, thresholds=LIMITS, on_alarm=act if clips else None) as monitor:
        for _ in range(9):
            x = torch.randn(4, 32, 16)
            loss = (model["head"](layer(model["embed"](x))) - x.roll(1, 1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss)
    return [json.loads(line) for line in file.read_text().splitlines()]


folder, last = Path(tempfile.mkdtemp()), {}
for name, clips in (("clipped", True), ("not clipped", False)):
    records = run(folder / f"{name}.jsonl", clips)
    for record in records:
        found = record["layers"]["attention"]
        largest, entropy = ([round(value, 2) for value in found[key]] for key in ("max_logit", "relative_entropy"))
        print(
            f"{name}, step {record['step']}: loss {record['loss']:.3f}, max logit {largest}, entropy / ln n {entropy}"
        )
    first, last[name] = (max(record["layers"]["attention"]["max_logit"]) for record in (records[0], records[-1]))
    assert first > LIMIT
assert last["clipped"] < LIMIT < last["not clipped"]
