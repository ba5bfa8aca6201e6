"""Functions that run on every rank: a patched Llama trained by several processes."""

import os
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.models import HEADS, LEARNED, llama, tokens
from tritonattn.core.shards import whole
from tritonattn.distributed import HeadParallel
from tritonattn.huggingface import patched

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


def sharded(model: Any, mesh: DeviceMesh, apart: bool = False, **options: Any) -> Any:
    """FSDP2; what scalings have learned is one group of its own, or that of its layer."""
    if apart:
        fully_shard([layer.self_attn.tritonattn for layer in model.model.layers], mesh=mesh)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def by_heads(model: Any, mesh: DeviceMesh, learned: bool = True) -> Any:
    """A patched Llama whose projections, and learned values, are sharded by head."""
    plan: dict[str, Any] = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {"self_attn.o_proj": RowwiseParallel(), **({"self_attn.tritonattn": HeadParallel()} if learned else {})}
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
    elif how.startswith("fsdp, "):
        model = sharded(model, data, apart=how == "fsdp, apart")
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


def dtypes_seen(rank: int) -> set[torch.dtype]:
    """The dtypes in which learned values and weights act under a policy of bf16."""
    model = llama()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    sharded(model, init_device_mesh("cpu", (4,)), apart=True, mp_policy=policy)
    seen = set()
    with patched(model).watch(lambda module, query, key, arguments, aux: seen.add(_learned_dtypes(module, query))):
        for _ in range(2):  # without a backward between
            model(input_ids=tokens()).logits.square().mean().backward()
            assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    return seen


def _learned_dtypes(module: Any, query: Tensor) -> tuple[torch.dtype, ...]:
    return (query.dtype, *{p.dtype for p in module.tritonattn.parameters()})


def checkpointed(rank: int, folder: str) -> None:
    """A checkpoint of FSDP2 x tensor parallelism is read by FSDP2 alone, and by one process, and back."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "other"))

    def filled(start: float) -> Any:
        model = llama()
        with torch.no_grad():
            for i, (name, p) in enumerate(model.named_parameters()):
                if "tritonattn" in name:
                    p.copy_(torch.arange(p.numel()).view_as(p) + start + 10 * i)
        return model

    worlds = {
        "both": lambda start: sharded(by_heads(filled(start), mesh["other"]), mesh["dp"]),
        "fsdp": lambda start: sharded(filled(start), mesh._flatten("all")),
        "one": filled,
    }
    for source, target in (("both", "fsdp"), ("both", "one"), ("fsdp", "both")):
        place = f"{folder}/{source} {target}"
        saved, loaded = worlds[source](0.25), worlds[target](7.0)
        dcp.save(get_model_state_dict(saved), checkpoint_id=place)
        state = get_model_state_dict(loaded)
        dcp.load(state, checkpoint_id=place)
        set_model_state_dict(loaded, state)
        wanted = dict(filled(0.25).named_parameters())
        for name, p in loaded.named_parameters():
            assert torch.equal(whole(p), wanted[name]), (source, target, name)


def planned(rank: int, folder: str) -> float:
    """Relative error of the logits of a saved patched model that transformers shards by its own plan."""
    from transformers.distributed import DistributedConfig

    if rank == 0:
        llama(kv_heads=HEADS).save_pretrained(folder)
    dist.barrier()
    config = DistributedConfig(tp_plan="auto", tp_size=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    assert patched(model).layers["model.layers.0.self_attn"].gain.to_local().shape == (1, 1)
    one = transformers.AutoModelForCausalLM.from_pretrained(folder)
    got, want = (whole(net(input_ids=tokens()).logits) for net in (model, one))
    for net in (model, one):
        net(input_ids=tokens()).logits.square().mean().backward()
    theirs = {name: p.grad for name, p in one.named_parameters()}
    worst = ((got - want).abs().max() / want.abs().max()).item()
    for name, p in model.named_parameters():
        if "tritonattn" in name:
            worst = max(worst, ((whole(p.grad) - theirs[name]).abs().max() / theirs[name].abs().max()).item())
    return worst


def trained_by_trainer(rank: int, folder: str, batch: int = 2) -> list[float]:
    """Learned values after transformers' Trainer, by accelerate's DDP, has trained on this rank's batches."""
    if dist.is_initialized():
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": dist.get_world_size(), "MASTER_ADDR": "localhost"}
        os.environ.update({name: str(value) for name, value in ranks.items()}, MASTER_PORT="0")
    options = transformers.TrainingArguments(
        folder,
        per_device_train_batch_size=batch,
        max_steps=3,
        learning_rate=10.0,
        lr_scheduler_type="constant",
        optim="sgd",
        use_cpu=True,
        ddp_backend="gloo" if dist.is_initialized() else None,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    model, rows = llama(), [{"input_ids": x, "labels": x} for x in tokens(batch=32)]
    transformers.Trainer(model, options, train_dataset=rows).train()
    return _learned(model)
