"""A small random Llama of transformers, and tokens for it."""

import torch

HEADS, KV_HEADS = 4, 2


def llama(implementation: str = "eager", **config):
    """2 layers of 4 heads of dim 8, 61 tokens, 64 positions; in training."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61}
    sizes |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 64}
    small = transformers.LlamaConfig(**sizes, **{"initializer_range": 0.3} | config)
    return transformers.AutoModelForCausalLM.from_config(small, attn_implementation=implementation).train()


def ids(batch: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(seed))
