"""`HeadParallel`: learned values of heads, sharded as the heads of q are."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle


class HeadParallel(ParallelStyle):
    """Shard what a scaling has learned by head, for `parallelize_module`, where q_proj is sharded by head.

    Args:
        *names: The parameters of the module to shard, as "sinks"; without names all those inside it.

    A parameter with a value a head on its first axis, [Hq] or [Hq, 1], becomes a DTensor, placed Shard(0): every rank
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
            own = dict(part.named_parameters(recurse=False))
            if missing := [name for name in self.names if name not in own]:
                kind = type(module).__name__
                raise ValueError(f"HeadParallel: expected names of {kind}'s parameters, got {', '.join(missing)}")
            for name, parameter in own.items():
                if not self.names or name in self.names:
                    part.register_parameter(name, _sharded(name, parameter, device_mesh))
        return module


def _sharded(name: str, parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    heads = parameter.shape[0] if parameter.dim() else 1
    if heads == 1 or heads % mesh.size():
        raise ValueError(
            f"{name}: expected a value a head on the first axis, whose number {mesh.size()} ranks divide, got"
            f" {list(parameter.shape)}; give a gain the shape [Hq, 1]"
        )
    return nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(0)]), requires_grad=parameter.requires_grad)
