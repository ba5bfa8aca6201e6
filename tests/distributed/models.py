"""A tiny patched Llama, and what shards it over ranks."""

from typing import Any

import torch
import transformers
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tritonattn.distributed import HeadParallel
from tritonattn.huggingface import patch
from tritonattn.nn import SSMax

VOCABULARY, HEADS, KV_HEADS = 64, 4, 2
LEARNED: dict[int, Any] = {0: {"scaling": "key_norm_mean", "gain": torch.ones(HEADS, 1)}, 1: SSMax(HEADS)}


def llama(layers: Any = LEARNED, kv_heads: int = KV_HEADS) -> Any:
    """A Llama of two layers in fp32, the same on every rank; patched unless layers is None."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=HEADS, num_key_value_heads=kv_heads)
    model = transformers.LlamaForCausalLM(config).float()
    if layers is not None:
        patch(model, layers=layers)
    return model


def tokens(step: int = 0, batch: int = 4, length: int = 16) -> torch.Tensor:
    """Token ids [B, S], the same on every rank."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1 + step))


def sharded(model: Any, mesh: DeviceMesh, apart: bool = False, **options: Any) -> Any:
    """FSDP2; what scalings have learned is a separate group, or in that of its layer."""
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
