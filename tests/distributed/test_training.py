"""A patched Llama trained by four processes: its losses, its checkpoints, and what would be wrong without a word."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.parallel import DistributedDataParallel

transformers = pytest.importorskip("transformers")
import tritonattn
from tests.distributed.models import HEADS, by_heads, llama, sharded, tokens
from tests.distributed.pool import on_every_rank
from tests.support.refusals import refuses
from tritonattn.core.torch_distributed import whole
from tritonattn.huggingface import patch, patched

STEPS = 20


def trained(model: Any, part, ranks: int = 1, shared=None) -> list[float]:
    """The loss of every step, summed over ranks, and at the end what the scalings have learned.

    part      function: this rank's rows of a batch
    ranks     how many the gradients are averaged over
    shared    mesh over which a sequence is cut
    """
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False), []
    for step in range(STEPS):
        ids = tokens(step % 2)
        labels = F.pad(ids, (0, 1), value=-100)[:, 1:].contiguous()  # the next token of each, none after the last
        positions = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
        parts = [part(x).clone() for x in (ids, positions, labels)]

        def backward(parts: list[Tensor], count: Tensor) -> Tensor:
            logits = model(input_ids=parts[0], position_ids=parts[1]).logits.flatten(0, 1)
            loss = F.cross_entropy(logits, parts[2].flatten(), ignore_index=-100, reduction="sum") / count
            (loss * ranks).backward()
            return loss.detach().clone()

        if shared is None:
            loss = backward(parts, (labels >= 0).sum())
        else:
            with context_parallel(shared, buffers=parts, buffer_seq_dims=[1, 1, 1]):
                loss = backward(parts, (labels >= 0).sum())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses + learned(model)


def learned(model: Any) -> list[float]:
    return [
        value for name, p in model.named_parameters() if "tritonattn" in name for value in whole(p).flatten().tolist()
    ]


def losses(rank: int, how: str) -> list[float]:
    """As `trained` in one process, over all ranks."""
    mesh = init_device_mesh("cpu", (2, 2) if " x " in how else (4, 1), mesh_dim_names=("dp", "other"))
    data, model = mesh["dp"], llama()
    if how == "ddp":
        model = DistributedDataParallel(model)
    elif how.startswith("fsdp, "):
        model = sharded(model, data, apart=how == "fsdp, apart")
    elif how in ("fsdp x tensor", "fsdp x tensor, context"):
        model = sharded(by_heads(model, mesh["other"]), data)
    else:
        model = sharded(model, mesh._flatten("all"))
    shared = {"fsdp x context": mesh["other"], "fsdp x tensor, context": data}.get(how)
    rows = 1 if shared is data else data.size()  # FSDP's ranks share sequences, or have different ones
    averaged = 4 if how == "fsdp x context" else data.size()
    found = trained(model, lambda x: x.chunk(rows)[data.get_local_rank() % rows], averaged, shared)
    for total in found[:STEPS]:
        dist.all_reduce(total)
    # Ranks of one tensor-parallel group count the same tokens.
    return [total.item() * averaged / 4 for total in found[:STEPS]] + found[STEPS:]


@pytest.fixture(scope="module")
def one() -> list[float]:
    return [float(x) for x in trained(llama(), lambda x: x)]


@pytest.mark.parametrize(
    "how", ["ddp", "fsdp, together", "fsdp, apart", "fsdp x tensor", "fsdp x context", "fsdp x tensor, context"]
)
def test_losses_and_learned_values_are_those_of_one_process(pool, one, how):
    for got in pool.run(losses, how):
        assert got == pytest.approx(one, rel=1e-5)


@on_every_rank
def test_what_is_learned_keeps_fp32_in_a_separate_group(rank: int) -> None:
    """Under a policy of bf16 weights act in it, learned values in fp32, gradients are fp32."""
    model, seen = llama(), set()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    sharded(model, init_device_mesh("cpu", (4,)), apart=True, mp_policy=policy)

    def look(module, query, key, arguments, aux) -> None:
        seen.add((query.dtype, *{p.dtype for p in module.tritonattn.parameters()}))

    with patched(model).watch(look):
        for _ in range(2):  # without a backward between
            model(input_ids=tokens()).logits.square().mean().backward()
            assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert seen == {(torch.bfloat16, torch.float32)}


@on_every_rank
def test_checkpoints_go_from_world_to_world(rank: int, tmp_path: Path) -> None:
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
        folder = tmp_path / f"{source} {target}"
        saved, loaded = worlds[source](0.25), worlds[target](7.0)
        dcp.save(get_model_state_dict(saved), checkpoint_id=folder)
        state = get_model_state_dict(loaded)
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(loaded, state)
        wanted = dict(filled(0.25).named_parameters())
        for name, p in loaded.named_parameters():
            assert torch.equal(whole(p), wanted[name]), (source, target, name)


def planned(rank: int, folder: Path) -> float:
    """Relative error of the logits and gradients of a saved patched model that transformers shards by its plan."""
    from transformers.distributed import DistributedConfig

    if rank == 0:
        llama(kv_heads=HEADS).save_pretrained(folder)
    dist.barrier()
    config = DistributedConfig(tp_plan="auto", tp_size=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    assert patched(model).layers["model.layers.0.self_attn"].gain.to_local().shape == (1, 1)
    one = transformers.AutoModelForCausalLM.from_pretrained(folder)
    pairs = [[whole(net(input_ids=tokens()).logits) for net in (model, one)]]
    for net in (model, one):
        net(input_ids=tokens()).logits.square().mean().backward()
    theirs = dict(one.named_parameters())
    pairs += [[whole(p.grad), theirs[name].grad] for name, p in model.named_parameters() if "tritonattn" in name]
    return max(((got - want).abs().max() / want.abs().max()).item() for got, want in pairs)


def test_the_plan_of_transformers_shards_learned_parameters(pool, tmp_path):
    pytest.importorskip("transformers.distributed.tensor_parallel")
    assert max(pool.run(planned, tmp_path)) < 5e-6


@pytest.mark.parametrize("layers", [{0: "key_norm_max", 1: "cosine"}, {0: {"gain": 2.0}, 1: "ssmax"}])
@on_every_rank
def test_a_patched_model_attends_to_the_whole_sequence_under_torchs_context_parallel(rank: int, layers) -> None:
    """Relative error of a patched model's loss and gradients under torch's context_parallel, on this rank."""
    from torch.distributed.tensor.experimental._attention import context_parallel_unshard

    mesh = init_device_mesh("cpu", (4,))
    ids = tokens(length=32)
    positions = torch.arange(32).expand(4, -1).contiguous()
    one, model = llama(layers), llama(layers)
    want = one(input_ids=ids, position_ids=positions).logits
    want.square().mean().backward()
    with context_parallel(mesh, buffers=[ids, positions], buffer_seq_dims=[1, 1]):
        got = model(input_ids=ids, position_ids=positions).logits
        got.square().mean().backward()
        (logits,) = context_parallel_unshard(mesh, [got.detach()], [1])
    worst = ((logits - want).abs().max() / want.abs().max()).item()
    for mine, theirs in zip(model.parameters(), one.parameters(), strict=True):
        torch.distributed.all_reduce(mine.grad, torch.distributed.ReduceOp.SUM)
        worst = max(worst, ((mine.grad / 4 - theirs.grad).abs().max() / theirs.grad.abs().max()).item())
    assert worst < 2e-6


@on_every_rank
def test_what_would_be_silently_wrong_is_refused(rank: int) -> None:
    """Every call that would be silently wrong raises, and names what to do."""
    mesh = init_device_mesh("cpu", (4,))
    q = torch.randn(1, 4, 32, 8)
    ids = tokens(length=32)
    with context_parallel(mesh, buffers=[q, ids], buffer_seq_dims=[2, 1]):
        refuses("NotImplementedError: ~ context_parallel_attention", tritonattn.attention, q, q, q, causal=True)
        refuses("ValueError: ~ position_ids", llama({0: "sqrt_dim", 1: "sqrt_dim"}), input_ids=ids)
        model = llama().train()
        model.model.layers[0].self_attn.attention_dropout = 0.1
        refuses("NotImplementedError: ~ dropout", model, input_ids=ids, position_ids=torch.arange(8)[None])
        padded = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]] * 4)
        refuses("NotImplementedError: ~ attention_mask", llama(), input_ids=ids, attention_mask=padded)
    tritonattn.attention(q, q, q)
    tensor_parallel = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"]
    one_number = {i: {"gain": torch.tensor(1.0)} for i in (0, 1)}
    refuses("ValueError: ~ one value per head", by_heads, llama(one_number), tensor_parallel)
    for layers, message in (
        (one_number, "gain: expected one value per head"),
        (dict.fromkeys((0, 1), "ssmax"), "HeadParallel"),
    ):
        sharded_alone = by_heads(llama(layers), tensor_parallel, learned=False)
        refuses(f"ValueError: ~ {message}", sharded_alone, input_ids=tokens())
    for wrap in (DistributedDataParallel, fully_shard):
        refuses("ValueError: ~ patch first", patch, wrap(llama(None)), scaling="ssmax")
        patch(wrap(llama(None)), scaling="key_norm_mean")
