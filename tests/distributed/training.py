"""What runs on every rank: a patched Llama trained by several processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.models import LEARNED, llama, tokens, whole
from tritonattn.distributed import HeadParallel

STEPS = 20


def _labels(ids: Tensor) -> Tensor:
    """The next token of each, none (-100) after the last."""
    return F.pad(ids, (0, 1), value=-100)[:, 1:].contiguous()


def _loss(model: Any, ids: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_ids=ids, position_ids=positions).logits
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def _positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand_as(ids).contiguous()


def _optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, foreach=False)


def losses_of_one(layers: Any = LEARNED) -> list[float]:
    """The loss of every step in one process, and at the end what the scalings have learned."""
    model, losses = llama(layers), []
    optimizer = _optimizer(model)
    for step in range(STEPS):
        ids = tokens(step % 2)
        labels = _labels(ids)
        loss = _loss(model, ids, _positions(ids), labels) / (labels >= 0).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses + _learned(model)


def _learned(model: Any) -> list[float]:
    return [
        value for name, p in model.named_parameters() if "tritonattn" in name for value in whole(p).flatten().tolist()
    ]


def sharded(model: Any, mesh: DeviceMesh) -> Any:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def by_heads(model: Any, mesh: DeviceMesh) -> Any:
    """A patched Llama whose projections and learned values are sharded by head."""
    plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {"self_attn.o_proj": RowwiseParallel(), "self_attn.tritonattn": HeadParallel()}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    return model


def losses(rank: int, how: str, layers: Any = LEARNED) -> list[float]:
    """As `losses_of_one`, over all ranks."""
    shape = {"fsdp x tensor": (2, 2), "fsdp x context": (2, 2)}.get(how, (4, 1))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "other"))
    data, model = mesh["dp"], llama(layers)
    if how == "ddp":
        model = DistributedDataParallel(model)
    elif how == "fsdp":
        model = sharded(model, data)
    elif how == "fsdp x tensor":
        model = sharded(by_heads(model, mesh["other"]), data)
    else:
        model = sharded(model, mesh._flatten("all"))
    optimizer, losses = _optimizer(model), []
    averaged = 4 if how == "fsdp x context" else data.size()  # ranks over which gradients are averaged
    for step in range(STEPS):
        ids = tokens(step % 2)
        labels = _labels(ids)
        count = (labels >= 0).sum()
        own = [x.chunk(data.size())[data.get_local_rank()].clone() for x in (ids, _positions(ids), labels)]
        if how == "fsdp x context":
            with context_parallel(mesh["other"], buffers=own, buffer_seq_dims=[1, 1, 1]):
                loss = _loss(model, *own) / count
                (loss * averaged).backward()
        else:
            loss = _loss(model, *own) / count
            (loss * averaged).backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() * averaged / 4)  # ranks of one tensor-parallel group count the same tokens
    return losses + _learned(model)
