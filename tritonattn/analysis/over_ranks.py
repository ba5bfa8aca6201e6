"""Exchange between the ranks of torch.distributed after a step: each has the record of one process."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor

_Key = TypeVar("_Key")


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without torch.distributed."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gathered(x: Any) -> list[Any]:
    """An object of every rank."""
    everyone: list[Any] = [None] * rank_and_size()[1]
    torch.distributed.all_gather_object(everyone, x)
    return everyone


def joined_losses(step: int, loss: float | None, not_finite: bool) -> tuple[float | None, bool]:
    """The mean loss of the ranks that have one, and True where any has seen one that was not finite.

    Raises RuntimeError on all ranks if they are not in the same step.
    """
    everyone = gathered((step, loss, not_finite))
    steps = sorted({one[0] for one in everyone})
    if len(steps) > 1:
        raise RuntimeError(f"Monitor: expected all ranks in the same step, got {steps}")
    losses = [one[1] for one in everyone if one[1] is not None]
    mean = math.fsum(losses) / len(losses) if losses and all(map(math.isfinite, losses)) else math.nan
    return (mean if losses else None), any(one[2] for one in everyone)


def reduced(tensors: dict[_Key, Tensor], operation: str, device: torch.device) -> dict[_Key, Tensor]:
    """Tensors of the same shapes on every rank, added ("SUM") or maximised ("MAX") over ranks in one message."""
    if not tensors:
        return {}
    flat = torch.cat([x.flatten() for x in tensors.values()]).to(device)
    torch.distributed.all_reduce(flat, getattr(torch.distributed.ReduceOp, operation))
    parts = flat.cpu().split([x.numel() for x in tensors.values()])
    return {key: part.view_as(x) for (key, x), part in zip(tensors.items(), parts, strict=True)}
