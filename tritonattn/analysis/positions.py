"""The loss of a causal model by position: whether it reads on beyond the length that it was trained at."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..calls.checks import check_count
from ..core.errors import install
from ..core.hints import type_of
from ..core.records import write
from ..integrations.finder import evaluating


def loss_by_position(
    model: nn.Module | Callable[[Tensor], Any], tokens: Tensor, trained_length: int
) -> dict[str, float]:
    """The mean loss of a causal model's next tokens, by stretch of positions: up to L, from L to 2 L, to 4 L, ...

        loss of stretch a-b = mean over texts and positions a <= i < b of  -ln p(token i + 1 | tokens 0 to i)

    Args:
        model: Takes tokens [B, S - 1] and gives logits [B, S - 1, V], or an object with such `logits`, as those of
            transformers. An nn.Module runs in eval mode, without gradients.
        tokens: Ids [B, S] without padding, S at least 2; longer than the trained length to see what comes after it.
        trained_length: L, at least 1.

    Returns:
        Nats a token by stretch, {"0-64": 3.1, "64-128": 3.0, "128-199": 3.4}. A model reads on if no later stretch
        has a higher loss than the first. Where few tokens need a long context a mean hides that they fail: measure
        recall, too.

    Raises:
        TypeError, ValueError: Tokens of another shape or dtype, another trained length, logits of another shape.

    >>> import torch
    >>> from tritonattn.analysis import loss_by_position
    >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 16), torch.nn.Linear(16, 50))
    >>> list(loss_by_position(model, torch.randint(50, (8, 200)), trained_length=64))
    ['0-64', '64-128', '128-199']
    """
    check_count("trained_length", trained_length, 1)
    if not isinstance(tokens, Tensor) or tokens.is_floating_point():
        raise TypeError(f"tokens: expected a tensor of ids, got {getattr(tokens, 'dtype', type_of(tokens))}")
    if tokens.dim() != 2 or tokens.shape[1] < 2 or len(tokens) < 1:
        raise ValueError(f"tokens: expected [B, S] with S at least 2, got {list(tokens.shape)}")
    with evaluating(model) if isinstance(model, nn.Module) else torch.no_grad():
        out = model(tokens[:, :-1])
    logits, wanted = getattr(out, "logits", out), (len(tokens), tokens.shape[1] - 1)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != wanted:
        got = list(logits.shape) if isinstance(logits, Tensor) else type_of(logits)
        raise ValueError(f"model: expected logits [{wanted[0]}, {wanted[1]}, V] of tokens[:, :-1], got {got}")
    targets = tokens[:, 1:].to(logits.device, torch.int64)
    losses = cross_entropy(logits.float().transpose(1, 2), targets, reduction="none").mean(0)
    edges = [0, *(trained_length * 2**i for i in range(32) if trained_length * 2**i < len(losses)), len(losses)]
    return {f"{a}-{b}": losses[a:b].mean().item() for a, b in pairwise(edges)}


def plot_loss_by_position(losses: Mapping[str, Mapping[str, float]], file: str | Path) -> None:
    """Draw losses by position, a step for each stretch, as a picture beside the numbers.

    Args:
        losses: Results of `loss_by_position` by name, {"sqrt_dim": ..., "log_key_count:64": ...}. A dashed line marks
            the end of each first stretch, the trained length.
        file: Its ending names the format: .png, .svg or .pdf.

    Raises:
        ImportError: Without matplotlib.
        ValueError: No losses, or an ending that matplotlib does not know.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plot_loss_by_position needs matplotlib: {install('monitor')}") from error
    if not losses:
        raise ValueError("losses: expected results of loss_by_position by name, got none")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="position", ylabel="loss, nats a token")
    for number, (name, stretches) in enumerate(losses.items()):
        edges = [0, *(int(stretch.split("-")[1]) for stretch in stretches)]
        axes.stairs(list(stretches.values()), edges, baseline=None, label=name, color=f"C{number}", linewidth=1.5)
        axes.axvline(edges[1], color="0.6", linestyle="--", linewidth=0.8)
    axes.set_xscale("symlog", base=2, linthresh=max(2, min(int(next(iter(x)).split("-")[1]) for x in losses.values())))
    axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, format=Path(file).suffix.removeprefix(".") or "png")
    write(Path(file), drawn.getvalue())
