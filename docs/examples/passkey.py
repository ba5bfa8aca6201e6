"""A GPT of 124M parameters on one GPU: trained on 2,048 tokens, does it find passkeys among 16,384?

    python docs/examples/passkey.py                                # a tiny model, to see that it works
    python docs/examples/passkey.py --size 124M --data train.bin   # six runs: three scalings, with and without QK-norm

train.bin holds GPT-2 tokens as uint16, as nanoGPT's data/openwebtext/prepare.py writes them; without it the text is
random. Eight passkeys of five digits, each with a name, are hidden in every window, and asked for by name at its end.
A run prints its loss and the share of passkeys with all digits right at 1, 2, 4 and 8 times the trained length.
Every other layer attends to all keys without positions and has the scaling; the rest are rotary, with a window.
"""

import argparse
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import tritonattn

NAMES, DIGITS, PASSKEYS = 64, 5, 8
QUESTION = 2 + DIGITS  # a mark, a name, the digits
SCALINGS = ("sqrt_dim", "log_key_count", "ssmax")
CARDS = {"A100": 312e12, "H100": 989e12}  # dense bf16 operations a second, NVIDIA's data sheets
SHARE = 0.35  # of them that training reaches, assumed


@dataclass(frozen=True)
class Size:
    layers: int
    width: int
    heads: int
    length: int  # tokens in training
    window: int  # keys of a row in every other layer
    rows: int  # windows at a time
    turns: int  # backward passes a step
    steps: int
    text: int  # tokens of text; marks, digits and names follow

    def hours(self, operations: float) -> float:
        """Modelled: 6 operations a parameter and token, and 3.5 times the products q k and p v of visible keys."""
        parameters = self.layers * 12 * self.width**2 + (self.text + 2 + 10 + NAMES) * self.width
        attention = 3.5 * self.layers * (self.length + 2 * self.window) * self.width
        tokens = self.steps * self.turns * self.rows * self.length
        return tokens * (6 * parameters + attention) / (SHARE * operations) / 3600


SIZES = {"tiny": Size(2, 32, 2, 128, 16, 4, 1, 2, 100), "124M": Size(12, 768, 12, 2048, 256, 8, 16, 2000, 50257)}


class Block(nn.Module):
    def __init__(self, size, scaling, qk_norm, index):
        super().__init__()
        modes = {
            "sqrt_dim": "sqrt_dim",
            "log_key_count": tritonattn.SCALINGS["log_key_count"](base=size.length),
            "ssmax": tritonattn.nn.SSMax(size.heads, base=size.length),
        }
        self.norms = nn.ModuleList([nn.LayerNorm(size.width), nn.LayerNorm(size.width)])
        windowed = {"window": (size.window - 1, 0), "rotary": 10_000.0}  # a window has few keys: they need no factor
        options = {"scaling": modes[scaling]} if index % 2 else windowed
        self.attention = tritonattn.nn.ScaledAttention(size.width, size.heads, qk_norm=qk_norm, causal=True, **options)
        self.mlp = nn.Sequential(
            nn.Linear(size.width, 4 * size.width), nn.GELU(), nn.Linear(4 * size.width, size.width)
        )

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self, size, scaling, qk_norm):
        super().__init__()
        self.tokens = nn.Embedding(size.text + 2 + 10 + NAMES, size.width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(size, scaling, qk_norm, i) for i in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)

    def forward(self, tokens, last):
        """Logits of what follows the last tokens; the embedding is the head too."""
        return self.norm(self.blocks(self.tokens(tokens))[:, -last:]) @ self.tokens.weight.T


def windows(data, size, rows, length, random):
    """Draw int64 [rows, length] of text, hide passkeys in it, and ask for them at the end."""
    if data is None:
        tokens = torch.randint(size.text, (rows, length), generator=random)
    else:
        starts = torch.randint(len(data) - length, (rows,), generator=random)
        tokens = torch.stack([data[start : start + length] for start in starts]).long()
    hidden, asked = size.text, size.text + 1
    for row in tokens:
        names = size.text + 12 + torch.randperm(NAMES, generator=random)[:PASSKEYS]
        keys = size.text + 2 + torch.randint(10, (PASSKEYS, DIGITS), generator=random)
        slots = torch.randperm(length // QUESTION - PASSKEYS, generator=random)[:PASSKEYS]
        for name, key, slot in zip(names, keys, slots, strict=True):
            row[slot * QUESTION : (slot + 1) * QUESTION] = torch.cat([torch.tensor([hidden, name]), key])
        for turn in range(PASSKEYS):
            start = length - (PASSKEYS - turn) * QUESTION
            row[start : start + QUESTION] = torch.cat([torch.tensor([asked, names[turn]]), keys[turn]])
    return tokens


def optimizer_of(model):
    """No weight decay of norms, biases and scalings."""
    scalings = set(tritonattn.nn.scaling_parameters(model))
    decayed = [p for p in model.parameters() if p.dim() > 1 and p not in scalings]
    kept = [p for p in model.parameters() if p.dim() <= 1 or p in scalings]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95))


def train(size, scaling, qk_norm, data, device):
    torch.manual_seed(0)
    model, random = GPT(size, scaling, qk_norm).to(device), torch.Generator().manual_seed(0)
    optimizer, warm = optimizer_of(model), max(1, size.steps // 10)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / warm) * (0.55 + 0.45 * math.cos(math.pi * i / size.steps))
    )
    for _ in range(size.steps):
        for _ in range(size.turns):
            tokens = windows(data, size, size.rows, size.length, random).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(tokens[:, :-1], last=size.length)
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
            (loss / size.turns).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    return model.eval(), loss.item()


@torch.no_grad()
def recalled(model, size, length, data, device, tests):
    """Share of the asked passkeys with all digits right, given the digits before."""
    random, rights = torch.Generator().manual_seed(1), []
    for _ in range(tests):
        tokens = windows(data, size, 1, length, random).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found = model(tokens[:, :-1], last=PASSKEYS * QUESTION).argmax(-1)
        right = found == tokens[:, -PASSKEYS * QUESTION :]
        rights.append(right.view(PASSKEYS, QUESTION)[:, 2:].all(-1).double().mean())
    return float(torch.stack(rights).mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--data", help="GPT-2 tokens as uint16")
    parser.add_argument("--tests", type=int, help="windows of each length (default: 200; 1 of the tiny model)")
    options = parser.parse_args()
    size, device = SIZES[options.size], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = None
    if options.data is not None:
        data = torch.from_file(options.data, size=Path(options.data).stat().st_size // 2, dtype=torch.uint16)
    costs = ", ".join(f"{6 * SIZES['124M'].hours(peak):.2g} hours on one {card}" for card, peak in CARDS.items())
    print(f"six runs of 124M: {costs} (modelled: {SHARE:.0%} of the card's bf16 rate; training only)")
    lengths = [size.length * times for times in (1, 2, 4, 8)]
    for qk_norm, scaling in itertools.product((True, False), SCALINGS):
        model, loss = train(size, scaling, qk_norm, data, device)
        tests = options.tests or (1 if options.size == "tiny" else 200)
        found = [f"{n:,}: {recalled(model, size, n, data, device, tests):.1%}" for n in lengths]
        print(f"{scaling}{', QK-norm' * qk_norm}: loss {loss:.3f}; recalled at {', '.join(found)}", flush=True)


if __name__ == "__main__":
    main()
