"""Styles of `parallelize_module`: layers on this rank's tokens of a sequence, and learned values of its heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from ..core.invariance import refuse_over_ranks
from ..core.torch_distributed import SharesSequence
from .agreement import require_agreement
from .context_parallel import context_parallel_attention
from .layout import Split
from .sequence import running_sum


class ContextParallel(ParallelStyle):
    """Let every `ScaledAttention`, `ForgetGate` and `ALiBi` of a module work on a sequence that ranks share.

    For `parallelize_module`. Each rank calls the module with its part of the tokens, as `shard` cuts them; results and
    gradients are those of the whole sequence. `ScaledAttention.positioned` gets positions in the whole sequence.

    Args:
        layout: How `shard` cut the sequence: "contiguous" or "zigzag".
        method, reduce_dtype, head_group: As in `context_parallel_attention`.

    Gradients of parameters are the parts of this rank's rows: sum them over ranks, as FSDP and DDP do. The same layers
    take tensor parallelism (`HeadParallel`) on another dimension of the mesh.

    Raises:
        TypeError, ValueError: A mesh of several dimensions, a layout, a module without such a layer. In a call: a
            cache, a context, dense masks, key_lengths, key_ranges.
        NotImplementedError: In a call: dropout, batch_invariant, backend "reference".

    >>> import torch, torch.distributed as dist, tritonattn
    >>> from torch.distributed.device_mesh import init_device_mesh
    >>> from torch.distributed.tensor.parallel import parallelize_module
    >>> from tritonattn.distributed import ContextParallel, shard
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun starts more
    >>> mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    >>> model = torch.nn.ModuleDict({
    ...     "attention": tritonattn.nn.ScaledAttention(32, heads=4, scaling="ssmax", causal=True),
    ...     "gate": tritonattn.nn.ForgetGate(32, heads=4),
    ... })
    >>> model = parallelize_module(model, mesh, ContextParallel(layout="zigzag"))
    >>> x = shard(torch.randn(2, 16, 32), mesh=mesh, layout="zigzag", dim=1)
    >>> model["attention"](x, key_bias=model["gate"](x)).shape
    torch.Size([2, 16, 32])
    >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        *,
        layout: str = "contiguous",
        method: str = "allgather",
        reduce_dtype: torch.dtype = torch.float32,
        head_group: int | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.options = {"method": method, "reduce_dtype": reduce_dtype, "head_group": head_group}

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        part = SequencePart(device_mesh, self.layout, self.options)
        takers = [one for one in module.modules() if isinstance(one, SharesSequence)]
        if not takers:
            raise ValueError(
                "ContextParallel: expected a module with a ScaledAttention, ForgetGate or ALiBi of tritonattn.nn, got"
                f" {type(module).__name__}"
            )
        for one in takers:
            one.sequence_part = part
        return module


@dataclass(frozen=True, eq=False)
class SequencePart:
    """This rank's tokens of the sequence that the ranks of a mesh share, for a layer."""

    mesh: DeviceMesh
    layout: str
    options: dict[str, Any]

    def __post_init__(self) -> None:
        Split.of(self.mesh, self.layout)

    @property
    def split(self) -> Split:
        return Split.of(self.mesh, self.layout)

    @property
    def ranks(self) -> int:
        return self.mesh.size()

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """The positions in the sequence of the `tokens` tokens that this rank holds: int64 [tokens]."""
        self.split.check("x", tokens)
        return self.split.positions(tokens, device)

    def running_sum(self, x: Tensor) -> Tensor:
        """Sums along the whole sequence up to and with each token of this rank, of x [..., tokens]: fp64."""
        split = self.split
        split.check("x", x.shape[-1])
        require_agreement(split, "ForgetGate", x=x, layout=self.layout)
        return running_sum(x, split)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float, batch_invariant: bool | None, **options: Any
    ) -> Any:
        if dropout_p > 0:
            raise NotImplementedError(f"dropout_p: expected 0 for a sequence split over ranks, got {dropout_p}")
        refuse_over_ranks(batch_invariant)
        return context_parallel_attention(q, k, v, mesh=self.mesh, layout=self.layout, **self.options, **options)


class HeadParallel(ParallelStyle):
    """Shard what a scaling has learned by head, for `parallelize_module`, where q_proj is sharded by head.

    Args:
        *names: The parameters of the module to shard, as "sinks"; without names all those inside it.

    A parameter with a value per head on its first axis, [Hq] or [Hq, 1], becomes a DTensor, placed Shard(0): every rank
    keeps and updates the values of its heads. It takes every learned scaling of `tritonattn.nn`, the child "tritonattn"
    of a patched layer with its gain, and the sinks of a layer.

    Raises:
        ValueError: A learned parameter of one value for all heads, whose gradient each rank would have a part of; a
            number of heads that the ranks do not divide; a name that no parameter has.

    >>> import torch.distributed as dist, tritonattn
    >>> from torch.distributed.device_mesh import init_device_mesh
    >>> from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    >>> from tritonattn.distributed import HeadParallel
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun starts more
    >>> mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    >>> layer = tritonattn.nn.ScaledAttention(32, heads=4, scaling="ssmax")
    >>> plan = {f"{name}_proj": ColwiseParallel() for name in "qkv"}
    >>> plan |= {"o_proj": RowwiseParallel(), "scaling": HeadParallel()}
    >>> parallelize_module(layer, mesh, plan).scaling.s.placements
    (Shard(dim=0),)
    >>> dist.destroy_process_group()
    """

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        parts = [module] if self.names else list(module.modules())
        for part in parts:
            found = dict(part.named_parameters(recurse=False))
            if missing := [name for name in self.names if name not in found]:
                expected = f"names of {type(module).__name__}'s parameters"
                raise ValueError(f"HeadParallel: expected {expected}, got {', '.join(missing)}")
            for name, parameter in found.items():
                if not self.names or name in self.names:
                    part.register_parameter(name, _sharded(name, parameter, device_mesh))
        return module


def _sharded(name: str, parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    heads = parameter.shape[0] if parameter.dim() else 1
    if heads == 1 or heads % mesh.size():
        raise ValueError(
            f"{name}: expected one value per head on the first axis, whose number {mesh.size()} ranks divide, got"
            f" {list(parameter.shape)}; give a gain the shape [Hq, 1]"
        )
    return nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(0)]), requires_grad=parameter.requires_grad)
