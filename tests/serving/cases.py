"""Tiny random models as checkpoints, their patches, and the check of what vLLM generates from them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import tritonattn.huggingface

VOCABULARY, STEPS, TOLERANCE = 96, 20, 1e-2
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
_GEMMA = {**_SIZES, "tie_word_embeddings": True, "sliding_window": 24, "final_logit_softcapping": None}
_CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES),
    "mistral": lambda: transformers.MistralConfig(**_SIZES, sliding_window=24),
    # Every other layer has the window. The factor besides the mode is 1 / sqrt(100), not 1 / sqrt(64).
    # SGLang 0.5.23 reads hidden_act.
    "gemma2": lambda: transformers.Gemma2Config(
        **_GEMMA, attn_logit_softcapping=5.0, query_pre_attn_scalar=100, hidden_act="gelu_pytorch_tanh"
    ),
    # Head dims 64 in the first layer, which has the window, and 512 in the others.
    "gemma4": lambda: transformers.Gemma4TextConfig(
        **_GEMMA,
        global_head_dim=512,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
    ),
    # The model multiplies q by 1 + ln(1 + floor(position / 16)) / 2. SGLang reads the length beside the parameters.
    "ministral3": lambda: transformers.Ministral3Config(
        **_SIZES,
        sliding_window=None,
        original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.5,
            "original_max_position_embeddings": 16,
        },
    ),
    # Three layers attend in chunks of 32 keys; the last has no positions, and multiplies q by
    # 1 + ln(1 + floor((position + 1) / 16)) / 2. What SGLang's file of the model lacks on a CPU is left out: experts
    # whose input has their weight (NotImplementedError), norms of q and k (bf16 alone), and rotary positions, which it
    # drops there; a factor of 1e6 makes them next to nothing.
    "llama4": lambda: transformers.Llama4TextConfig(
        **{**_SIZES, "num_hidden_layers": 4},
        intermediate_size_mlp=512,
        attention_chunk_size=32,
        floor_scale=16,
        attn_scale=0.5,
        use_qk_norm=False,
        interleave_moe_layer_step=8,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 1e6,
            "low_freq_factor": 4.0,
            "high_freq_factor": 8.0,
            "original_max_position_embeddings": 16,
        },
        pad_token_id=0,
    ),
}


_S, _B, _GAIN = [0.1, 0.4, 0.8, 0.3], [0.5, -0.25, 0.0, 0.25], [0.5, 1.5, 2.0, 0.75]


def learned(model: Any) -> None:
    """Layer 0 ssmax, layer 1 the model's, layer 2 key_norm_mean with a gain of each head."""
    layers = {
        0: tritonattn.nn.SSMax(4, bias=True),
        2: {"scaling": "key_norm_mean", "gain": torch.tensor(_GAIN)[:, None]},
    }
    patch = tritonattn.huggingface.patch(model, layers=layers)
    with torch.no_grad():
        scaling = patch.layers["model.layers.0.self_attn"].scaling
        scaling.s.copy_(torch.tensor(_S))
        scaling.b.copy_(torch.tensor(_B))


def gains(model: Any) -> None:
    """log_key_count with another gain in every layer."""
    count = model.config.num_hidden_layers
    layers = {i: {"scaling": "log_key_count", "gain": gain} for i, gain in enumerate(_GAIN[:count])}
    tritonattn.huggingface.patch(model, layers=layers)


@dataclass(frozen=True)
class Case:
    """A model, its scaling, and options of the server's engine.

    scaling   a mode of all layers, given to the server in its command; or a function that patches the model, whose
              checkpoint is then all that the server gets
    """

    model: str
    scaling: str | Callable[[Any], None]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """For the command, where the checkpoint has none."""
        return {} if callable(self.scaling) else {"tritonattn": {"scaling": self.scaling}}

    def make(self, folder: Path) -> tuple[Any, Any, dict[str, Any]]:
        """`save`, and arguments of vLLM's LLM."""
        settings = {"additional_config": self.settings} if self.settings else {}
        return *self.save(folder), {"model": str(folder), **ENGINE, **settings, **self.options}

    def save(self, folder: Path) -> tuple[Any, Any]:
        """Save the checkpoint; the patched and the plain model of transformers."""
        torch.manual_seed(0)
        config = _CONFIGS[self.model]()
        plain = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        if config.tie_word_embeddings:  # otherwise every model repeats the last token
            plain.get_input_embeddings().weight.data.mul_(0.1)
        plain.save_pretrained(folder)
        patched = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        if callable(self.scaling):
            self.scaling(patched)
            patched.save_pretrained(folder)
        else:
            tritonattn.huggingface.patch(patched, scaling=self.scaling)
        return patched, plain


ENGINE = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "block_size": 16,
    "num_gpu_blocks_override": 96,
    "logprobs_mode": "raw_logits",
    "max_logprobs": -1,
}


def prompts() -> list[list[int]]:
    """Prompts of 1 to 150 tokens, some of which begin alike."""
    numbers = torch.randint(3, VOCABULARY, (400,), generator=torch.Generator().manual_seed(1)).tolist()
    long, others = numbers[:100], iter(numbers[100:])
    alone = [[next(others) for _ in range(n)] for n in (1, 17, 40)]
    alike = [long[:keys] + [next(others) for _ in range(n)] for keys, n in ((64, 3), (100, 1), (100, 50))]
    return [*alone, *alike, long[:9] * 7]


def generate(llm: Any, tokens: list[list[int]], **options: Any) -> list[Any]:
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=STEPS, ignore_eos=True, detokenize=False, logprobs=-1, **options
    )
    return llm.generate([{"prompt_token_ids": x} for x in tokens], sampling, use_tqdm=False)


@torch.no_grad()
def difference(model: Any, outputs: list[Any]) -> tuple[int, float]:
    """Generated tokens that are not the model's, and the largest difference of a raw logit."""
    wrong, largest = 0, 0.0
    for output in outputs:
        prompt, made = output.prompt_token_ids, list(output.outputs[0].token_ids)
        tokens = [*prompt, *made]
        logits = model(torch.tensor([tokens])).logits[0]
        rows = dict(enumerate(output.prompt_logprobs or [], -1)) | dict(
            enumerate(output.outputs[0].logprobs, len(prompt) - 1)
        )
        got = {i: torch.tensor([row[t].logprob for t in range(VOCABULARY)]) for i, row in rows.items() if row}
        largest = max(largest, *(float((x - logits[i]).abs().max()) for i, x in got.items()))
        wrong += int((logits[len(prompt) - 1 : -1].argmax(-1) != torch.tensor(made)).sum())
    return wrong, largest
