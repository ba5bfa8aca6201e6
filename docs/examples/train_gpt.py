"""Train a small GPT that reads on past its trained length: rotary positions, QK-norm, and SSMax (arXiv:2501.19399)."""

import math

import torch
from torch import nn

import tritonattn

TEXT = "the quick brown fox jumps over the lazy dog; " * 40
WIDTH, HEADS, LENGTH, STEPS = 64, 4, 64, 30


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.attention = tritonattn.nn.ScaledAttention(
            WIDTH,
            HEADS,
            scaling=tritonattn.nn.SSMax(HEADS, base=LENGTH),  # each head learns how its logits grow with its keys
            qk_norm=True,  # which bounds logits: without a factor that grows, attention fades as keys are added
            rotary=10_000.0,
            causal=True,
        )
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.blocks = nn.Embedding(256, WIDTH), nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, 256)

    def loss(self, data, length, rows):
        """Cross entropy of the last LENGTH bytes of random windows."""
        starts = torch.randint(len(data) - length - 1, (rows,))
        batch = torch.stack([data[start : start + length + 1] for start in starts])
        logits = self.head(self.blocks(self.tokens(batch[:, :-1])))
        return nn.functional.cross_entropy(logits[:, -LENGTH:].flatten(0, 1), batch[:, -LENGTH:].flatten())


torch.manual_seed(0)
data = torch.tensor(list(TEXT.encode()))
model = GPT()
learned = set(tritonattn.nn.scaling_parameters(model))  # weight decay would pull them to 0, which is uniform attention
optimizer = torch.optim.AdamW(
    [
        {"params": [p for p in model.parameters() if p not in learned], "weight_decay": 0.1},
        {"params": list(learned), "weight_decay": 0.0},
    ],
    lr=5e-3,
)
losses = []
for _ in range(STEPS):
    loss = model.loss(data, LENGTH, rows=16)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
with torch.no_grad():
    longer = model.loss(data, 4 * LENGTH, rows=16).item()
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; at 4 times the length, {4 * LENGTH} bytes: {longer:.2f}")
print(f"s of every head, {1 / math.log(LENGTH):.2f} at the start:")
for name, parameter in model.named_parameters():
    if name.endswith("scaling.s"):
        print(f"{name}: {[round(s, 2) for s in parameter.tolist()]}")
assert losses[-1] < 1.0 < losses[0]
assert longer < 1.0
