"""Watch a training run with Monitor; QK-clip takes a head back when its logits pass a threshold."""

import json
import tempfile
from pathlib import Path

import torch
from torch import nn

import tritonattn
from tritonattn.analysis import Monitor, Thresholds, qk_clip

torch.manual_seed(0)
LIMIT = 30.0
model = nn.ModuleDict(
    {
        "embed": nn.Linear(16, 64),
        "attention": tritonattn.nn.ScaledAttention(64, heads=4, causal=True),
        "head": nn.Linear(64, 16),
    }
)
with torch.no_grad():
    model["attention"].q_proj.weight[16:32] *= 60  # head 1 is in trouble
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
file = Path(tempfile.mkdtemp()) / "watch.jsonl"

clip = qk_clip(model, threshold=LIMIT)
limits = Thresholds(max_logit=LIMIT, near_one_hot=None, near_uniform=None)


def act(alarms):
    for layer, gamma in clip(alarms).items():
        print(f"step {alarms[0].step}: {layer} clipped by {[round(g, 2) for g in gamma.tolist()]}")


with Monitor(model, every=2, file=file, thresholds=limits, on_alarm=act) as monitor:
    for _ in range(9):
        x = torch.randn(4, 32, 16)
        loss = (model["head"](model["attention"](model["embed"](x))) - x.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.step(loss)

records = [json.loads(line) for line in file.read_text().splitlines()]
for record in records:
    layer = record["layers"]["attention"]
    largest, entropy = ([round(value, 2) for value in layer[name]] for name in ("max_logit", "relative_entropy"))
    print(f"step {record['step']}: loss {record['loss']:.3f}, max logit {largest}, entropy / ln n {entropy}")
first, last = (max(record["layers"]["attention"]["max_logit"]) for record in (records[0], records[-1]))
assert first > LIMIT
assert last < 1.2 * LIMIT
