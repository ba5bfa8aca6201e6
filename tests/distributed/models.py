"""A tiny Llama, and what the ranks do with it."""

from typing import Any

import torch
import transformers

from tritonattn.huggingface import patch

VOCABULARY, HEADS, KV_HEADS = 64, 4, 2
LEARNED: dict[int, Any] = {0: {"scaling": "key_norm_mean", "gain": torch.ones(HEADS, 1)}, 1: "ssmax"}


def llama(layers: Any = LEARNED, kv_heads: int = KV_HEADS) -> Any:
    """A Llama of two layers in fp32, the same on every rank; patched unless layers is None."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
    )
    model = transformers.LlamaForCausalLM(config).float()
    if layers is not None:
        patch(model, layers=layers)
    return model


def tokens(step: int = 0, batch: int = 4, length: int = 16) -> torch.Tensor:
    """Token ids [B, S], the same on every rank."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1 + step))
