"""One training run."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from tritonattn.analysis.row_statistics import relative_entropy
from tritonattn.core.observation import ObservedCall, Observer
from tritonattn.nn import ScaledAttention, scaling_parameters

from .modes import trained_and_tested
from .records import Recipe, Run
from .tasks import TASKS, Batch, loss_of

# Weights before the softmax's input, and those whose gradient bypasses it.
_PARTS = {"qk": ("q_proj", "k_proj"), "vo": ("v_proj", "o_proj")}
_WARM = 0.1  # share of the steps in which the learning rate rises
_LAST = 0.1  # share of the learning rate at the end of the cosine


def train(run: Run, device: torch.device, tick: Callable[[], object] = lambda: None, observations: int = 20) -> Run:
    """Train the model of a run, fill in what it found, and return it; tick is called once a step.

    A run repeats itself, on a CPU to the bit.

    observations   number of times that losses, gradients and entropies are taken, the last step included
    """
    start, task, recipe = time.perf_counter(), TASKS[run.task], run.recipe
    model = fresh_model(run).to(device)
    optimizer = _optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe.steps))
    random = torch.Generator().manual_seed(run.seed)
    held_out = task.held_out().to(device)
    digest, losses = hashlib.sha256(), []
    every = max(1, recipe.steps // observations)
    for step in range(1, recipe.steps + 1):
        batch = task.batch(recipe.batch, random)
        for x in (*batch.inputs.values(), batch.target):
            digest.update(x.contiguous().numpy().tobytes())
        batch = batch.to(device)
        loss = loss_of(model(**batch.inputs), batch.target)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        observed = step % every == 0 or step == recipe.steps
        if observed:
            _observe(run, step, model, losses, held_out)
            losses = []
        optimizer.step()
        schedule.step()
        tick()
        if observed and not (math.isfinite(run.train_loss[-1]) and math.isfinite(run.held_out_loss[-1])):
            run.status = "diverged"
            break
    run.data = digest.hexdigest()[:16]
    _finish(run, model, device)
    run.seconds = time.perf_counter() - start
    return run


def fresh_model(run: Run, mode: str | None = None) -> nn.Module:
    """Make the untrained model of a seed, by default with the mode to train with; its weights depend on no mode."""
    torch.manual_seed(run.seed)
    task = TASKS[run.task]
    heads = task.sizes.heads if run.head_dim is None else task.sizes.width // run.head_dim
    mode = mode or trained_and_tested(run.mode)[0]
    return task.model(replace(task.sizes, heads=heads, qk_norm=run.qk_norm, mode=mode))


def as_tested(run: Run, model: nn.Module) -> nn.Module:
    """Give the weights of a trained model the scaling that the run tests with; without another, return the model."""
    trained, tested = trained_and_tested(run.mode)
    if tested == trained:
        return model
    swapped = fresh_model(run, tested)
    weights = {name: x for name, x in model.state_dict().items() if ".scaling." not in name}
    swapped.load_state_dict(weights, strict=False)
    return swapped


def attentions(model: nn.Module) -> dict[str, ScaledAttention]:
    """Find the attention layers by name, in the order in which they run."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ScaledAttention)}


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Compute gradient norms by layer and part, such as "blocks.0.attention qk".

    "qk" are the weights that make q and k, "vo" those of v and the output.
    """
    found = {}
    for name, layer in attentions(model).items():
        for part, projections in _PARTS.items():
            gradients = [layer.get_submodule(one).weight.grad for one in projections]
            squares = [g.double().square().sum() for g in gradients if isinstance(g, Tensor)]
            found[f"{name} {part}"] = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    return found


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


@torch.no_grad()
def _observe(run: Run, step: int, model: nn.Module, losses: list[Tensor], held_out: Batch) -> None:
    run.steps.append(step)
    run.train_loss.append(float(torch.stack(losses).mean()))
    for name, norm in gradient_norms(model).items():
        run.gradients.setdefault(name, []).append(norm)
    calls: list[ObservedCall] = []
    observer = Observer(calls.append)
    observer.begin()
    try:
        run.held_out_loss.append(float(loss_of(model.eval()(**held_out.inputs), held_out.target)))
    finally:
        observer.close()
    model.train()
    for name, call in zip(attentions(model), calls, strict=True):
        run.entropy.setdefault(name, []).append(_entropy(call))


def _entropy(call: ObservedCall) -> float:
    """Mean entropy / ln n over the rows of n > 1 visible keys: 1 is uniform attention, 0 a single key."""
    entropy = call.rows().entropy  # [B, Hq, Sq]
    counts = call.visibility.counts().expand_as(entropy)
    return float(relative_entropy(entropy, counts)[counts > 1].mean())


@torch.no_grad()
def _finish(run: Run, model: nn.Module, device: torch.device) -> None:
    task, reached = TASKS[run.task], zip(run.steps, run.held_out_loss, strict=True)
    run.steps_to_target = next((step for step, loss in reached if loss <= task.target), None)
    if run.status == "trained":
        run.metrics = task.final(as_tested(run, model).to(device).eval(), device, run.quick)
    for name, layer in attentions(model).items():
        if isinstance(layer.scaling, nn.Module):
            run.scaling[name] = {one: p.tolist() for one, p in layer.scaling.named_parameters()}
