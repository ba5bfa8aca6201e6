"""Tensors and attention that torch.distributed has changed, found without importing it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .private_names import attribute, private

_EXPERIMENTAL = "torch.distributed.tensor.experimental"
TORCHS_ATTENTION = private("torch._C._nn.scaled_dot_product_attention", F.scaled_dot_product_attention)


class TorchContext(NamedTuple):
    """torch's context parallelism, as it is in force.

    mesh     the DeviceMesh whose ranks share every sequence
    layout   as in `tritonattn.distributed.shard`
    """

    mesh: Any
    layout: str


def context_parallel() -> TorchContext | None:
    """The context of torch.distributed.tensor.experimental.context_parallel in which this runs, if any.

    torch has no function that tells: the context shows in its replacement of F.scaled_dot_product_attention. Raises
    NotImplementedError under a torch whose private names are not known.
    """
    replacement: Any = F.scaled_dot_product_attention
    if replacement is TORCHS_ATTENTION:
        return None
    home = getattr(replacement, "__module__", None) or ""
    if not home.startswith(_EXPERIMENTAL):
        return None
    try:
        cells = (cell.cell_contents for cell in replacement.__closure__)
        mesh = dict(zip(replacement.__code__.co_freevars, cells, strict=True))["device_mesh"]
        balanced = attribute(sys.modules[home], f"{_EXPERIMENTAL}._attention._cp_options").enable_load_balance
    except (AttributeError, ImportError, KeyError, TypeError) as error:
        raise NotImplementedError(
            "context_parallel: expected torch's replacement of F.scaled_dot_product_attention to hold `device_mesh`,"
            f" and {home} to hold `_cp_options.enable_load_balance`, and torch {torch.__version__} lacks one;"
            " call tritonattn.distributed.context_parallel_attention, outside of the context"
        ) from error
    return TorchContext(mesh, "zigzag" if balanced else "contiguous")


def refuse_context_parallel(name: str) -> None:
    """Raise where torch's context_parallel has cut the sequence: a function or layer would get one part of it."""
    if context_parallel() is not None:
        raise NotImplementedError(
            f"{name}: torch's context_parallel is active, and tensors are this rank's part of the sequence: expected"
            " tritonattn.distributed.context_parallel_attention, or ContextParallel for layers, which take all of it"
        )


class SharesSequence:
    """A module that `tritonattn.distributed.ContextParallel` can tell to work on this rank's tokens of a sequence.

    sequence_part   `distributed.layers.SequencePart`, or None where x holds whole sequences
    """

    sequence_part: Any = None

    def _positions(self, tokens: int, device: torch.device) -> Tensor:
        """The positions in their sequence of the tokens that a call holds: int64 [tokens]."""
        if self.sequence_part is None:
            return torch.arange(tokens, device=device)
        return self.sequence_part.positions(tokens, device)


def is_dtensor(*values: Any) -> bool:
    """True where one of the values is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return False
    for value in values:  # no generator: every call asks
        if type(value) is module.DTensor:
            return True
    return False


def local(x: Any) -> Tensor:
    """This rank's part of a DTensor; another tensor as it is."""
    return x.to_local() if is_dtensor(x) else x


def whole(x: Any) -> Tensor:
    """All of a DTensor, gathered on every rank; another tensor as it is."""
    return x.full_tensor() if is_dtensor(x) else x


def unshard(module: nn.Module) -> None:
    """Gather parameters that fully_shard took by themselves: FSDP2 gathers before a forward, and scalings have none.

    FSDP2 reduces their gradients and drops the gathered values at the end of backward, as it does for any module.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        taken: list[Any] = [part for part in module.modules() if isinstance(part, fsdp.FSDPModule)]
        for part in taken:
            part.unshard()


def head_part(module: nn.Module) -> tuple[int, int]:
    """(number, of how many): the part of its heads that a running attention module has on this rank.

    While it runs FSDP has gathered its parameters, so that a sharded one is sharded by tensor parallelism.
    """
    for x in module.parameters():
        if is_dtensor(x) and not all(placement.is_replicate() for placement in x.placements):  # pyright: ignore
            mesh, number, count = x.device_mesh, 0, 1  # pyright: ignore[reportAttributeAccessIssue]
            for i, placement in enumerate(x.placements):  # pyright: ignore[reportAttributeAccessIssue]
                if not placement.is_replicate():
                    number, count = number * mesh.size(i) + mesh.get_local_rank(i), count * mesh.size(i)
            return number, count
    return 0, 1


def rows_of_rank(x: Any, values: Tensor) -> Tensor:
    """This rank's part of values [n, ...] that all ranks hold alike: that of its rows of x [n, ...].

    Counted here, since torch 2.8 takes the _StridedShard of FSDP2 x tensor parallelism for a Shard: the dimensions of
    the mesh that shard plainly divide the rows first, from left to right, then those that shard in strides.
    """
    if not is_dtensor(x):
        return values
    placed = [
        (type(one).__name__ != "Shard", i) for i, one in enumerate(x.placements) if getattr(one, "dim", None) == 0
    ]
    rows = torch.arange(x.shape[0], device=values.device)
    for _, i in sorted(placed, key=lambda one: (one[0], -one[1] if one[0] else one[1])):
        parts, number = rows.chunk(x.device_mesh.size(i)), x.device_mesh.get_local_rank(i)
        rows = parts[number] if number < len(parts) else rows[:0]
    return values[rows]


def twin(module: nn.Module, parameter: Callable[[Tensor], Tensor]) -> Any:
    """A shallow copy of a module, with what `parameter` makes of its parameters."""
    copied = copy.copy(module)
    tied = {name: getattr(module, name) for name in vars(module).get("ties", ())}  # of `nn.Learned`
    parameters, children = {**module._parameters, **tied}.items(), module._modules.items()
    copied.__dict__["_parameters"] = {name: None if x is None else parameter(x) for name, x in parameters}
    copied.__dict__.pop("ties", None)
    copied.__dict__["_modules"] = {name: None if x is None else twin(x, parameter) for name, x in children}
    return copied


_OF_PEFT = ("PeftModel", "BaseTunerLayer")  # around a model, or in the place of its modules


def refuse_wrapped(model: nn.Module, saved_by: str) -> None:
    """Raise ValueError where parameters that are added to a model would not be reduced over ranks, or not saved.

    saved_by   the argument by which PEFT saves them
    """
    got = f"got a {type(model).__name__} for learned parameters"
    if (obstacle := obstacle_to_parameters(model)) is not None:
        raise ValueError(
            f"model: expected one that is not distributed yet, {got}, but"
            f" {obstacle}: nothing would reduce their gradients over ranks; patch first, then wrap or shard"
        )
    names = {base.__name__ for part in model.modules() for base in type(part).__mro__}
    if not names.isdisjoint(_OF_PEFT):
        raise ValueError(
            f"model: expected one that PEFT has not adapted yet, {got}, which its save_pretrained would leave out:"
            f" patch first, then get_peft_model with {saved_by}; or merge_and_unload() before"
        )


def obstacle_to_parameters(module: nn.Module) -> str | None:
    """The reason why parameters added to a module from now on would not be reduced over ranks, or None."""
    for part in module.modules():
        name = type(part).__name__
        if name in ("DistributedDataParallel", "FullyShardedDataParallel"):
            return f"it is wrapped in {name}"
        if any(base.__name__ == "FSDPModule" for base in type(part).__mro__):
            return "fully_shard has been applied to it"
    if is_dtensor(*module.parameters()):
        return "its parameters are DTensors"
    return None
