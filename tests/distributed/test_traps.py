"""Mistakes that gave wrong numbers without a word under more than one process."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers")
import tritonattn
from tests.distributed.models import by_heads, llama, tokens
from tritonattn.huggingface import patch


def logits_in_context_parallel(rank: int, layers) -> float:
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
    return worst


@pytest.mark.parametrize("layers", [{0: "key_norm_max", 1: "cosine"}, {0: {"gain": 2.0}, 1: "ssmax"}])
def test_a_patched_model_attends_to_the_whole_sequence_under_torchs_context_parallel(pool, layers):
    assert max(pool.run(logits_in_context_parallel, layers)) < 2e-6


def refusals(rank: int) -> None:
    """Every call that would be silently wrong raises, and names what to do."""
    mesh = init_device_mesh("cpu", (4,))
    q = torch.randn(1, 4, 32, 8)
    ids = tokens(length=32)
    with context_parallel(mesh, buffers=[q, ids], buffer_seq_dims=[2, 1]):
        with pytest.raises(NotImplementedError, match="context_parallel_attention"):
            tritonattn.attention(q, q, q, causal=True)
        with pytest.raises(ValueError, match="position_ids"):
            llama({0: "sqrt_dim", 1: "sqrt_dim"})(input_ids=ids)
        model = llama().train()
        model.model.layers[0].self_attn.attention_dropout = 0.1
        with pytest.raises(NotImplementedError, match="dropout"):
            model(input_ids=ids, position_ids=torch.arange(8)[None])
        with pytest.raises(NotImplementedError, match="attention_mask"):
            llama()(input_ids=ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]] * 4))
    tritonattn.attention(q, q, q)
    tensor_parallel = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"]
    one_number = {i: {"gain": torch.tensor(1.0)} for i in (0, 1)}
    with pytest.raises(ValueError, match="a value a head"):
        by_heads(llama(one_number), tensor_parallel)
    for layers, message in (
        (one_number, "gain: expected a value a head"),
        (dict.fromkeys((0, 1), "ssmax"), "HeadParallel"),
    ):
        with pytest.raises(ValueError, match=message):
            by_heads(llama(layers), tensor_parallel, learned=False)(input_ids=tokens())
    for wrap in (DistributedDataParallel, fully_shard):
        with pytest.raises(ValueError, match="patch first"):
            patch(wrap(llama(None)), scaling="ssmax")
        patch(wrap(llama(None)), scaling="key_norm_mean")


def test_what_would_be_silently_wrong_is_refused(pool):
    pool.run(refusals)
