"""Models for the model tests of transformers; `transformers_tests.py` copies this file next to them."""

from __future__ import annotations

import copy
import os
import unittest

import torch
import transformers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from tritonattn.huggingface import attention_forward, key_range_mask, register

from ..test_modeling_common import ModelTesterMixin

FAULT = float(os.environ.get("TRITONATTN_PEERS_FAULT", "1"))
SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
ENCODER = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}


def attention(module, query, key, value, mask, scaling=None, dropout=0.0, **kwargs):
    """Ours; a fault in its scale, for the tests of the tests, comes from the environment."""
    scaling = FAULT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    return attention_forward(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)


register("tritonattn", attention, key_range_mask)
transformers.AttentionInterface.register("sdpa", attention)
ALL_MASK_ATTENTION_FUNCTIONS._global_mapping["sdpa"] = key_range_mask


class Tester:
    """The attributes that transformers' tests read from a model tester."""

    batch_size, seq_length, num_hidden_layers, hidden_size, num_attention_heads = 3, 7, 2, 32, 4
    is_training = False

    def __init__(self, config) -> None:
        self.config = config

    def get_config(self):
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, 61, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def model_test(name: str, config):
    class OneModel(ModelTesterMixin, unittest.TestCase):
        all_model_classes = (getattr(transformers, name),)
        pipeline_model_mapping: dict = {}  # noqa: RUF012  that is how transformers' tests declare it

        def setUp(self) -> None:
            self.model_tester = Tester(config)

        def test_equals_eager_in_bfloat16_padded_left(self) -> None:
            self.flash_attn_inference_equivalence("tritonattn", padding_side="left")

        def test_equals_eager_in_bfloat16_padded_right(self) -> None:
            self.flash_attn_inference_equivalence("tritonattn", padding_side="right")

    return OneModel


LlamaTest = model_test("LlamaForCausalLM", transformers.LlamaConfig(**SMALL))
MistralTest = model_test("MistralForCausalLM", transformers.MistralConfig(**SMALL, sliding_window=4))
Qwen3Test = model_test("Qwen3ForCausalLM", transformers.Qwen3Config(**SMALL, head_dim=8))
Gemma3Test = model_test(
    "Gemma3ForCausalLM",
    transformers.Gemma3TextConfig(
        **SMALL, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
)
BertTest = model_test("BertModel", transformers.BertConfig(**ENCODER))
GPT2Test = model_test("GPT2LMHeadModel", transformers.GPT2Config(**GPT2))
