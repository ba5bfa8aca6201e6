"""Tiny random models of many architectures, with their inputs.

Weights of size 1: with the usual 0.02 attention is uniform, and no wrong scaling would show.
"""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
VOCABULARY = 61
TOKENS = 13
PADDINGS = {
    "none": None,
    "left": [[0, 0, 0] + [1] * 10, [1] * TOKENS],
    "right": [[1] * 9 + [0] * 4, [1] * TOKENS],
    "holes": [[1, 1, 0, 1, 0, 0] + [1] * 7, [1] * TOKENS],
}

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZES = {**_LAYERS, "intermediate_size": 48, "initializer_range": 1.0}
_ENCODER = {**_TOKENS, **_SIZES, "max_position_embeddings": 64}
_SMALL = {**_ENCODER, "num_key_value_heads": 2}
_STACK = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
_SEQ2SEQ = {
    **_TOKENS,
    **{f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in _STACK.items()},
    **{"d_model": 32, "max_position_embeddings": 64, "init_std": 1.0, "dropout": 0.0},
    **{"eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None},
}
_VISION = {**_SIZES, "image_size": 12, "patch_size": 4}


@dataclass(frozen=True)
class Architecture:
    """A class of models, the name and arguments of its config, and the type of its inputs.

    input_type   "decoder", "encoder", "seq2seq", "speech", "image" or "image and text"
    """

    model: str
    config: str
    arguments: dict[str, Any]
    input_type: str = "decoder"
    since: tuple[int, int] = (4, 54)  # a version of transformers in which it can be patched

    @property
    def exists(self) -> bool:
        """True where the installed transformers has it."""
        return hasattr(transformers, self.config)

    @property
    def supported(self) -> bool:
        return VERSION >= self.since

    @property
    def generates(self) -> bool:
        return self.input_type in ("decoder", "seq2seq", "speech")

    @property
    def takes_padding(self) -> bool:
        return self.input_type in ("decoder", "encoder", "seq2seq", "image and text")

    def build(self, implementation: str = "eager") -> Any:
        """The model, in evaluation, with the same weights every time."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.arguments)
        config._attn_implementation = implementation
        network = getattr(transformers, self.model)(config).eval()
        for module in network.modules():
            for name in ("sinks", "temp"):
                if isinstance(parameter := getattr(module, name, None), nn.Parameter):
                    nn.init.normal_(parameter)
        return network

    def inputs(self, padding: str = "none") -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, VOCABULARY, (2, TOKENS), generator=generator)
        mask = None if PADDINGS[padding] is None else {"attention_mask": torch.tensor(PADDINGS[padding])}
        if self.input_type == "image":
            return {"pixel_values": torch.randn(2, 3, 12, 12, generator=generator)}
        if self.input_type == "image and text":
            pixels = torch.randn(2, 3, 12, 12, generator=generator)
            ids = torch.where(torch.arange(TOKENS) == 8, VOCABULARY - 1, ids.clamp(max=VOCABULARY - 2))  # the end
            return {"input_ids": ids, "pixel_values": pixels, **(mask or {})}
        if self.input_type == "speech":
            return {"input_features": torch.randn(2, 8, 26, generator=generator), "decoder_input_ids": ids[:, :7]}
        if self.input_type == "seq2seq":
            return {"input_ids": ids, "decoder_input_ids": ids[:, 2:9], **(mask or {})}
        return {"input_ids": ids, **(mask or {})}

    def outputs(self, network: Any, inputs: dict[str, Tensor]) -> Tensor:
        """The model's outputs at inputs that are not padding, [..., any]."""
        options = {"use_cache": False} if self.generates else {}
        result = network(**inputs, **options)
        if self.input_type == "image and text":
            return torch.cat([result.logits_per_text, result.text_embeds, result.image_embeds], dim=-1)
        out = result.logits if hasattr(result, "logits") else result.last_hidden_state
        mask = inputs.get("attention_mask")
        return out if mask is None or self.input_type == "seq2seq" else out[mask.bool()]


def _decoder(name: str, **changes: Any) -> Architecture:
    arguments = {key: value for key, value in {**_SMALL, **changes}.items() if value is not NotImplemented}
    return Architecture(f"{name}ForCausalLM", f"{name}Config", arguments)


_GPT2 = {
    **_TOKENS,
    **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 1.0},
    **dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.0),
}
_OPT = {
    **_TOKENS,
    **_LAYERS,
    **{"ffn_dim": 48, "max_position_embeddings": 64, "init_std": 1.0, "word_embed_proj_dim": 32, "dropout": 0.0},
}
_WHISPER = {
    **_SEQ2SEQ,
    **{"max_source_positions": 13, "max_target_positions": 64, "num_mel_bins": 8},
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens")),
}
_LAYERED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 1}

_T5 = {
    **_TOKENS,
    **{"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0},
    **{"eos_token_id": 2, "decoder_start_token_id": 1, "initializer_factor": 3.0},
}


def _t5(name: str, **changes: Any) -> Architecture:
    """Biases of pairs, by a table of distances."""
    return Architecture(
        f"{name}ForConditionalGeneration", f"{name}Config", {**_T5, **changes}, "seq2seq", since=(5, 24)
    )


_INKLING = {
    **_SMALL,
    **{"head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8},
    **{"layer_types": ["hybrid_sliding", "hybrid"], "sliding_window_size": 5, "rel_extent": 7, "d_rel": 4},
    **{"mlp_layer_types": ["dense", "dense"], "n_routed_experts": 4, "num_experts_per_tok": 1},
}

_INKLING_2 = {**_INKLING, "n_layers_per_attn_res_block": 1, "log_scaling_n_floor": 4, "qk_l2_clip_threshold": 2.0}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _decoder("Llama"),
    "llama_yarn": _decoder(
        "Llama",
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4},
    ),
    "mistral": _decoder("Mistral", sliding_window=5),
    "qwen2": _decoder("Qwen2"),
    "qwen2_window": _decoder("Qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": _decoder("Qwen3", head_dim=8),
    "gemma": _decoder("Gemma", head_dim=8),
    "gemma2": _decoder("Gemma2", **_LAYERED, query_pre_attn_scalar=3, attn_logit_softcapping=2.0),
    "gemma3": Architecture("Gemma3ForCausalLM", "Gemma3TextConfig", {**_SMALL, **_LAYERED, "query_pre_attn_scalar": 3}),
    "phi3": _decoder("Phi3", sliding_window=5),
    "gpt2": Architecture("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt2_inverse_layer": Architecture(
        "GPT2LMHeadModel", "GPT2Config", {**_GPT2, "scale_attn_by_inverse_layer_idx": True}, since=(5, 8)
    ),
    "gpt_neox": _decoder("GPTNeoX", num_key_value_heads=NotImplemented),
    "opt": Architecture("OPTForCausalLM", "OPTConfig", _OPT),
    "olmo2": _decoder("Olmo2"),
    "granite": _decoder("Granite", attention_multiplier=0.3),
    "cohere": _decoder("Cohere"),
    "smollm3": _decoder("SmolLM3", use_sliding_window=False),
    "gpt_oss": _decoder("GptOss", **_LAYERED, num_local_experts=2, num_experts_per_tok=1),
    "llama4": Architecture(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**_SMALL, "head_dim": 8, "attention_chunk_size": 5, "no_rope_layers": [1, 0], "moe_layers": []}
        | {"intermediate_size_mlp": 48, "floor_scale": 4, "attn_scale": 0.5},
    ),
    "beam": _decoder("Beam", **_LAYERED, **_EXPERTS, mlp_layer_types=["dense"] * 2, n_group=2, topk_group=1),
    "zaya": _decoder("Zaya", head_dim=8, router_hidden_size=8, intermediate_size=NotImplemented, **_EXPERTS),
    "bert": Architecture("BertForMaskedLM", "BertConfig", _ENCODER, "encoder", since=(5, 0)),
    "roberta": Architecture("RobertaForMaskedLM", "RobertaConfig", _ENCODER, "encoder", since=(5, 0)),
    "vit": Architecture("ViTModel", "ViTConfig", _VISION, "image"),
    "clip": Architecture(
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**_ENCODER, "projection_dim": 16, "eos_token_id": VOCABULARY - 1},
            "vision_config": {**_VISION, "projection_dim": 16},
            "projection_dim": 16,
            "initializer_factor": 20.0,
        },
        "image and text",
    ),
    "whisper": Architecture("WhisperForConditionalGeneration", "WhisperConfig", _WHISPER, "speech"),
    "bart": Architecture("BartForConditionalGeneration", "BartConfig", _SEQ2SEQ, "seq2seq"),
    # Without support for SDPA; their layers' is_causal contradicts their masks.
    "splinter": Architecture("SplinterModel", "SplinterConfig", _ENCODER, "encoder"),
    "nllb_moe": Architecture(
        "NllbMoeForConditionalGeneration",
        "NllbMoeConfig",
        {**_SEQ2SEQ, "num_experts": 2, "encoder_sparse_step": 0, "decoder_sparse_step": 0},
        "seq2seq",
    ),
    "t5": _t5("T5"),
    "umt5": _t5("UMT5"),
    "longt5": _t5("LongT5", encoder_attention_type="local", local_radius=4),
    # The bias of a pair from the query's hidden state, for the nearest keys.
    "inkling": Architecture("InklingForCausalLM", "InklingTextConfig", _INKLING, since=(5, 24)),
    # The same, and a sink for each token.
    "inkling2": Architecture("Inkling2ForCausalLM", "Inkling2TextConfig", _INKLING_2, since=(5, 24)),
}
