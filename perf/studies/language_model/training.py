"""Train one model until its trained length is solved, cool it down, and test it at multiples of that length."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritonattn.nn import SSMax, scaling_parameters

from .model import GPT, Factor, Shape, Swap, swapped
from .tasks import TASKS, Code, Ledger, library

_WARM, _EVERY = 50, 25  # steps: of the rate's rise, and between two looks at held-out sequences
_EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096)  # of positions whose losses are told apart in a text


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    optimizer   "adamw", or "muon" for the matrices of layers and AdamW for the rest
    rate        of AdamW; `matrix_rate` of Muon
    target      accuracy on held-out sequences of the trained length, from which on the rate falls; None: none
    cap         steps at most until then
    cool        steps in which the rate falls to 0
    precision   of products in training, "fp32" or "bf16"; tests are in fp32
    """

    optimizer: str = "adamw"
    rate: float = 5e-3
    matrix_rate: float = 0.01
    batch: int = 16
    target: float | None = 0.95
    cap: int = 1500
    cool: int = 300
    precision: str = "fp32"


@dataclass(frozen=True)
class Cell:
    """One model to train."""

    task: str
    shape: Shape
    recipe: Recipe
    seed: int

    @property
    def name(self) -> str:
        """Words that tell it from the study's other cells."""
        shape, factor = self.shape, self.shape.factor
        words = [self.task, shape.layers, f"qk_norm={shape.qk_norm}", factor.name]
        words += [f"x{factor.gain:g}"] * (factor.gain != 1) + ["everywhere"] * (shape.where == "all")
        words += [f"width={shape.width}"] * (shape.width != Shape.width)
        return " ".join([*words, f"window={shape.window}", self.recipe.optimizer, f"seed={self.seed}"])


@dataclass
class Outcome:
    """The outcome of a cell.

    data        digest of a text; "" of a ledger
    solved_at   steps until the target was met at the full rate; None: it was not, or there is none
    steps       trained, those of the cooling included
    results     by swap and multiple of the trained length: loss and accuracy over the last half of the sequence, and
                of a text the losses by position
    s           of SSMax by layer and head
    """

    solved_at: int | None
    steps: int
    train_loss: float
    cpu_seconds: float
    data: str = ""
    results: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    s: list[list[float]] = field(default_factory=list)


def optimizers(model: GPT, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Matrices of layers apart from the rest; vectors and scalings are not decayed."""
    scalings = set(scaling_parameters(model))
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and name[:4] not in ("toke", "head")]
    matrices = [p for p in matrices if p not in scalings and p.shape[0] > 2]
    rest = set(model.parameters()) - set(matrices)
    tables = [p for p in model.parameters() if p in rest and p.dim() == 2 and p not in scalings]
    vectors = [p for p in model.parameters() if p in rest and p not in set(tables)]
    groups: list[dict[str, Any]] = [
        {"params": tables, "weight_decay": 0.01},
        {"params": vectors, "weight_decay": 0.0},
    ]
    settings = {"lr": recipe.rate, "betas": (0.9, 0.98), "foreach": True}
    if recipe.optimizer == "adamw":
        groups[0]["params"] += matrices
        return [torch.optim.AdamW(groups, **settings)]
    muon = torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [torch.optim.AdamW(groups, **settings), muon]


def loss_of(model: GPT, tokens: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and the rightness of each token that is asked for, in order of rows and positions."""
    logits = model(tokens[:, :-1], asked[:, 1:])
    wanted = tokens[:, 1:][asked[:, 1:]]
    return F.cross_entropy(logits.float(), wanted, reduction="none"), logits.argmax(-1) == wanted


def trained(cell: Cell, *, test_tokens: int, swaps: tuple[Swap, ...]) -> Outcome:
    """Train a cell, and test it as it is and with each swap. Weights and data depend on the seed alone."""
    began, task, recipe = time.process_time(), TASKS[cell.task], cell.recipe
    torch.manual_seed(cell.seed)
    model = GPT(cell.shape, task.vocabulary, task.length, spread=0.5 if cell.task == "ledger" else 0.1)
    generator = torch.Generator().manual_seed(1000 + cell.seed)
    opts, losses = optimizers(model, recipe), []
    rates = [[group["lr"] for group in one.param_groups] for one in opts]
    held_out = task.test(1, 64 * task.length) if recipe.target is not None else None
    solved_at, step, left = None, 0, None
    while left is None or left > 0:
        share = min(1.0, (step + 1) / _WARM) * (1.0 if left is None else left / recipe.cool)
        for one, of_groups in zip(opts, rates, strict=True):
            for group, rate in zip(one.param_groups, of_groups, strict=True):
                group["lr"] = rate * share
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
            loss = loss_of(model, *task.train(recipe.batch, generator))[0].mean()
        for one in opts:
            one.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for one in opts:
            one.step()
        losses.append(float(loss.detach()))
        step += 1
        if left is not None:
            left -= 1
            continue
        if held_out is not None and step % _EVERY == 0 and measured(model, *held_out)["accuracy"] >= recipe.target:
            solved_at = step
        if solved_at is not None or step >= recipe.cap:
            left = recipe.cool
    found = Outcome(solved_at, step, sum(losses[-50:]) / len(losses[-50:]), 0.0)
    found.data = library().digest if cell.task == "code" else ""
    found.results = tested(model, task, test_tokens, swaps)
    found.s = [layer.scaling.s.tolist() for layer in model.layers if isinstance(layer.scaling, SSMax)]
    found.cpu_seconds = time.process_time() - began
    return found


def tested(model: GPT, task: Ledger | Code, tokens: int, swaps: tuple[Swap, ...]) -> dict[str, dict[str, dict]]:
    found: dict[str, dict[str, dict]] = {}
    for multiple in task.multiples:
        rows = task.test(multiple, tokens)
        for swap in swaps:
            if multiple > 1 or swap.name == "" or (swap.factor or Factor()).gain != 1:
                with swapped(model, swap, multiple, task.length):
                    found.setdefault(swap.name, {})[str(multiple)] = measured(model, *rows)
    return found


@torch.no_grad()
def measured(model: GPT, tokens: Tensor, asked: Tensor) -> dict[str, Any]:
    """Loss in nats and accuracy over the last half of the sequence, and losses by position where all are asked for."""
    rows = max(1, 8192 // tokens.shape[1])
    parts = [loss_of(model, t, a) for t, a in zip(tokens.split(rows), asked.split(rows), strict=True)]
    loss, right = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]).float()
    place = asked[:, 1:].nonzero()[:, 1]
    late = place >= (tokens.shape[1] - 1) // 2
    found: dict[str, Any] = {"loss": float(loss[late].mean()), "accuracy": float(right[late].mean())}
    if asked.all():
        inside = [(a, b) for a, b in pairwise(_EDGES) if b < tokens.shape[1]]
        found["by_position"] = {f"{a}-{b}": float(loss[(place >= a) & (place < b)].mean()) for a, b in inside}
    return found
