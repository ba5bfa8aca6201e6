"""One training run."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...nn import scaling_parameters
from .models import Attentions
from .observe import attentions, entropies, gradient_norms
from .records import Recipe
from .tasks import Batch, Task, loss_of

_WARM = 0.1  # share of the steps in which the learning rate rises
_LAST = 0.1  # share of the learning rate at the end of the cosine


@dataclass
class Trace:
    """The outcome of a run; lists as in `records.Run`."""

    status: str = "trained"
    data: str = ""
    seconds: float = 0.0
    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    held_out_loss: list[float] = field(default_factory=list)
    gradients: dict[str, list[float]] = field(default_factory=dict)
    entropy: dict[str, list[float]] = field(default_factory=dict)
    steps_to_target: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    scaling: dict[str, dict[str, list[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Assignment:
    """A run to train. seed sets the weights and the order of the data, neither of which depends on the mode.

    observations   number of times that losses, gradients and entropies are taken, the last step included
    """

    task: Task
    mode: str
    seed: int
    recipe: Recipe
    device: torch.device
    quick: bool = False
    observations: int = 20


def train(assignment: Assignment, tick: Callable[[], object] = lambda: None) -> Trace:
    """Train a fresh model; tick is called once a step. An assignment repeats itself, on a CPU to the bit."""
    task, recipe = assignment.task, assignment.recipe
    start, trace = time.perf_counter(), Trace()
    model = fresh_model(assignment)
    optimizer = _optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe.steps))
    random = torch.Generator().manual_seed(assignment.seed)
    held_out = task.held_out().to(assignment.device)
    digest, losses = hashlib.sha256(), []
    every = max(1, recipe.steps // assignment.observations)
    for step in range(1, recipe.steps + 1):
        batch = task.batch(recipe.batch, random)
        _digest(digest, batch)
        batch = batch.to(assignment.device)
        loss = loss_of(model(**batch.inputs), batch.target)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        observed = step % every == 0 or step == recipe.steps
        if observed:
            _observe(trace, step, model, losses, held_out)
            losses = []
        optimizer.step()
        schedule.step()
        tick()
        if observed and not (math.isfinite(trace.train_loss[-1]) and math.isfinite(trace.held_out_loss[-1])):
            trace.status = "diverged"
            break
    trace.data = digest.hexdigest()[:16]
    _finish(trace, model, assignment)
    trace.seconds = time.perf_counter() - start
    return trace


def fresh_model(assignment: Assignment) -> nn.Module:
    """Make the untrained model of a seed: its weights are the same with every mode."""
    torch.manual_seed(assignment.seed)
    task = assignment.task
    return task.model(Attentions(assignment.mode, task.sizes)).to(assignment.device)


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Make the optimizer; parameters of scalings, and those of one dimension, are not decayed."""
    scalings = set(scaling_parameters(model))
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p not in scalings and p.dim() > 1]
    kept = [p for p in trained if p in scalings or p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.99))
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=0.9)


def _rate(step: int, steps: int) -> float:
    """Compute the share of the learning rate: a linear rise, then a cosine."""
    warm = max(1, round(_WARM * steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return _LAST + (1 - _LAST) * (1 + math.cos(math.pi * done)) / 2


def _digest(digest, batch: Batch) -> None:
    for x in (*batch.inputs.values(), batch.target):
        digest.update(x.contiguous().numpy().tobytes())


@torch.no_grad()
def _observe(trace: Trace, step: int, model: nn.Module, losses: list[Tensor], held_out: Batch) -> None:
    trace.steps.append(step)
    trace.train_loss.append(float(torch.stack(losses).mean()))
    for name, norm in gradient_norms(model).items():
        trace.gradients.setdefault(name, []).append(norm)
    model.eval()
    with entropies(model) as found:
        trace.held_out_loss.append(float(loss_of(model(**held_out.inputs), held_out.target)))
    model.train()
    for name, entropy in found.items():
        trace.entropy.setdefault(name, []).append(entropy)


@torch.no_grad()
def _finish(trace: Trace, model: nn.Module, assignment: Assignment) -> None:
    reached = zip(trace.steps, trace.held_out_loss, strict=True)
    trace.steps_to_target = next((step for step, loss in reached if loss <= assignment.task.target), None)
    if trace.status == "trained":
        trace.metrics = assignment.task.final(model.eval(), assignment.device, assignment.quick)
    for name, layer in attentions(model).items():
        if isinstance(layer.scaling, nn.Module):
            trace.scaling[name] = {one: p.tolist() for one, p in layer.scaling.named_parameters()}
