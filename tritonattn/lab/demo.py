"""`tritonattn demo`: small GPTs learn to look up records in 64 tokens and then read 2,048, by the factor on q.k."""

from __future__ import annotations

import functools
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from ..core.records import FIGURES
from ..nn import ScaledAttention, scaling_parameters
from ..scaling import SCALINGS
from .ledger import NAMES, VALUES, VOCABULARY, ledger

LENGTH, MULTIPLES = 64, (1, 8, 32)
WIDTH, HEADS, WINDOW = 64, 2, 4
STEPS = 500
_ROWS, _RATE, _WARM = 16, 7e-3, 50
_TOKENS = 32_768  # in testing, at each length
SWAPPED = "qwen_logn"
# Values recalled at 32 times the trained length: docs/language-model.md, means of 5 seeds.
STUDY = {"sqrt_dim": 0.558, f"log_key_count:{LENGTH}": 0.944, f"ssmax:{LENGTH}": 0.956, SWAPPED: 0.941}

_ABOUT = """\
Small GPTs learn to look up records: a name comes again, any distance later, and they say the value that it
had. They learn it in {length} tokens, then read {most:,}. Their layers are those of Llama 4: rotary positions in a
window of {window} tokens, then all keys without positions. QK-norm bounds the logits, so that every key that is
added takes probability from the right one. The models differ in the factor on q.k alone: 1/sqrt(D), the
control, a factor that grows like ln n, and one that learns how fast it grows. n is the number of keys.
{models} models, about {seconds} s each on one core:"""
_CONCLUSION = """\
At 32 times the trained length 1/sqrt(D) recalls {control:.0%}, and ln(n)/ln({length})/sqrt(D) {log:.0%}.
Put into the model that was trained with 1/sqrt(D), without any training, such a factor recalls {swapped:.0%}:

    layer.scaling = "{mode}:{length}"  # max(1, ln(n)/ln({length})) / sqrt(D)

One seed, {steps} steps. The study's column has means of 5 seeds, trained until 95% were right: docs/language-model.md

Build one:                              docs/examples/train_gpt.py
See a pretrained model under a factor:  tritonattn compare (fetches SmolLM2-135M, 93 MB)
Ask which factor a model needs:         tritonattn advise --model MODEL --text FILE"""
_SECONDS = 15  # of a model, on one core


class Block(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)])
        self.attention = ScaledAttention(WIDTH, HEADS, qk_norm=True, causal=True, **options)
        self.attention.q_norm.requires_grad_(False)  # QK-norm without learned weights
        self.attention.k_norm.requires_grad_(False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    """A layer with a window and rotary positions, and one over all keys without positions, which has the scaling."""

    def __init__(self, scaling: Any) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        nn.init.normal_(self.tokens.weight, std=0.5)
        self.first = Block(window=(WINDOW - 1, 0), rotary=10.0)
        self.last = Block(scaling=scaling)
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VALUES)

    def forward(self, tokens: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of values at the tokens before those that are asked for, and these values: [N, VALUES], [N]."""
        x = self.last(self.first(self.tokens(tokens[:, :-1])))
        return self.head(self.norm(x[asked[:, 1:]])), tokens[:, 1:][asked[:, 1:]] - NAMES


def run(device: torch.device) -> int:
    """Say what comes, train and test the models, and print how much they recall. Returns 0."""
    sizes = {"length": LENGTH, "most": LENGTH * MULTIPLES[-1], "window": WINDOW}
    print(_ABOUT.format(models=len(STUDY) - 1, seconds=_SECONDS, **sizes), flush=True)
    print(f"\n{report(device, STEPS)}")
    return 0


def report(device: torch.device, steps: int) -> str:
    """Train and test the models, telling stderr of each; return the table and the conclusion."""
    found: dict[str, list[float]] = {}
    for name in STUDY:
        if name == SWAPPED:
            continue
        print(f"{name}: {steps} steps, ", end="", file=sys.stderr, flush=True)
        start, model = time.perf_counter(), trained(name, device, steps)
        print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
        found[name] = recalls(model)
        if name == "sqrt_dim":
            model.last.attention.scaling = SCALINGS[SWAPPED](LENGTH)
            found[SWAPPED] = recalls(model)
    names = {SWAPPED: f"sqrt_dim, then {SWAPPED}:{LENGTH}"}
    rows = [[names.get(name, name), *map("{:.1%}".format, (*found[name], STUDY[name]))] for name in STUDY]
    lengths = [LENGTH * multiple for multiple in MULTIPLES]
    headers = ["values recalled", *(f"{n:,} tokens" for n in lengths), f"study,\n{lengths[-1]:,}"]
    control, log, _, swapped = (found[name][-1] for name in STUDY)
    told = {"length": LENGTH, "mode": SWAPPED, "steps": steps}
    conclusion = _CONCLUSION.format(control=control, log=log, swapped=swapped, **told)
    return f"{tabulate(rows, headers, 'simple', **FIGURES)}\n\n{conclusion}"


def trained(scaling: str, device: torch.device, steps: int) -> GPT:
    """Train a model of seed 0; all begin with the same weights and read the same records."""
    torch.manual_seed(0)
    model, random = GPT(scaling).to(device), torch.Generator().manual_seed(0)
    learned = list(scaling_parameters(model))
    others = [p for p in model.parameters() if not any(p is one for one in learned)]
    groups = [{"params": others, "weight_decay": 0.01}, {"params": learned, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=_RATE, betas=(0.9, 0.98))
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / _WARM, 2 * (1 - step / steps))
    )
    for _ in range(steps):
        logits, values = model(*(x.to(device) for x in ledger(_ROWS, LENGTH, random)))
        optimizer.zero_grad()
        F.cross_entropy(logits, values).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    return model


@torch.no_grad()
def recalls(model: GPT) -> list[float]:
    """Shares of values recalled at MULTIPLES of the trained length, in the last half of each sequence."""
    found = []
    for multiple in MULTIPLES:
        tokens, asked = held_out(multiple)
        logits, values = model(*(x.to(model.tokens.weight.device) for x in (tokens, asked)))
        found.append(float((logits.argmax(-1) == values).double().mean()))
    return found


@functools.cache
def held_out(multiple: int) -> tuple[Tensor, Tensor]:
    length = multiple * LENGTH
    tokens, asked = ledger(_TOKENS // length, length, torch.Generator().manual_seed(multiple))
    asked[:, : length // 2] = False
    return tokens, asked
