"""Train a small GPT on 64 tokens and let it read 2,048: with SSMax (arXiv:2501.19399), and with 1/sqrt(D) beside it.

Its text is a ledger: names with their values, in which a name comes again, any distance later, with the value that it
had. The layers are those of Llama 4: one with rotary positions and a window, then one over all keys without positions,
QK-norm without learned weights in both, and the factor in the latter alone.
"""

import math

import torch
from torch import nn

import tritonattn

NAMES, VALUES, WIDTH, HEADS, LENGTH, STEPS = 1024, 32, 64, 2, 64, 400


def ledger(rows, length, random):
    """Draw names and values, int64 [rows, length / 2], and where a name comes again, bool."""
    shape = rows, length // 2
    new = torch.rand(shape, generator=random) < 0.05 + 0.6 * torch.rand(rows, 1, generator=random)
    new[:, 0] = True
    seen = new.cumsum(1)
    entry = torch.where(new, seen - 1, (torch.rand(shape, generator=random) * seen).long())
    names = torch.rand(rows, NAMES, generator=random).argsort(1)
    values = torch.randint(VALUES, (rows, NAMES), generator=random)
    return names.gather(1, entry), values.gather(1, entry), ~new


class Block(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)])
        self.attention = tritonattn.nn.ScaledAttention(WIDTH, HEADS, qk_norm=True, causal=True, **options)
        self.attention.q_norm.requires_grad_(False)  # learned weights let logits grow: attention fades less, and later
        self.attention.k_norm.requires_grad_(False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self, scaling):
        super().__init__()
        self.tokens = nn.Embedding(NAMES + VALUES, WIDTH)
        nn.init.normal_(self.tokens.weight, std=0.5)
        self.blocks = nn.Sequential(Block(window=(3, 0), rotary=10.0), Block(scaling=scaling))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VALUES)

    def forward(self, names, values):
        """Logits of each name's value, [rows, names, VALUES]."""
        tokens = torch.stack([names, NAMES + values], dim=-1).flatten(1)
        return self.head(self.norm(self.blocks(self.tokens(tokens))[:, ::2]))


def trained(scaling):
    torch.manual_seed(0)
    model, random = GPT(scaling), torch.Generator().manual_seed(0)
    learned = set(tritonattn.nn.scaling_parameters(model))  # weight decay pulls them to 0, which is uniform attention
    others = [p for p in model.parameters() if p not in learned]
    groups = [{"params": others, "weight_decay": 0.01}, {"params": list(learned), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=7e-3, betas=(0.9, 0.98))
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / 50, 2 * (1 - i / STEPS)))
    for _ in range(STEPS):
        names, values, again = ledger(16, LENGTH, random)
        loss = nn.functional.cross_entropy(model(names, values)[again], values[again])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    return model


@torch.no_grad()
def recalled(model, length):
    """Share of the values recalled, of names that come again in the last half of a sequence."""
    names, values, again = ledger(max(16, 16384 // length), length, torch.Generator().manual_seed(1))
    again[:, : length // 4] = False
    return (model(names, values).argmax(-1) == values)[again].double().mean().item()


ssmax = tritonattn.nn.SSMax(HEADS, base=LENGTH)  # s ln(n) / sqrt(D) for each head; at n = LENGTH it begins at 1/sqrt(D)
found = {}
for scaling in ("sqrt_dim", ssmax):
    model, name = trained(scaling), "SSMax" if scaling is ssmax else scaling
    found[name] = {length: recalled(model, length) for length in (LENGTH, 4 * LENGTH, 32 * LENGTH)}
    print(f"{name}, values recalled:", ", ".join(f"{share:.1%} at {n} tokens" for n, share in found[name].items()))
print(f"s of every head, {1 / math.log(LENGTH):.2f} at the start: {[round(s, 2) for s in ssmax.s.tolist()]}")
assert all(shares[LENGTH] > 0.9 for shares in found.values())  # both have learned it
assert found["SSMax"][32 * LENGTH] > found["sqrt_dim"][32 * LENGTH] + 0.25
