"""Train a small GPT whose every head learns how its logits grow with the number of keys (SSMax, arXiv:2501.19399)."""

import torch
from torch import nn

import tritonattn

TEXT = "the quick brown fox jumps over the lazy dog; " * 40
WIDTH, HEADS, LENGTH, STEPS = 64, 4, 64, 30


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.attention = tritonattn.nn.ScaledAttention(WIDTH, HEADS, scaling="ssmax", causal=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, tokens):
        return self.head(self.blocks(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]))


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
    starts = torch.randint(len(data) - LENGTH - 1, (16,))
    batch = torch.stack([data[start : start + LENGTH + 1] for start in starts])
    loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
for number, block in enumerate(model.blocks):
    print(f"layer {number}: s = {[round(s, 2) for s in block.attention.scaling.s.tolist()]}, 1.0 at the start")
assert losses[-1] < 1.0 < losses[0]
