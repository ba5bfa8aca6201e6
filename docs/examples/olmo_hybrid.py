"""A hybrid like OLMo 3.5's in plain transformers, and the same model patched: n is exact under caches and padding.

Layers over all keys multiply q by s_h ln n, after a QK-norm with gains per head. They have no positions, and a gate on
their output. The other layers have rotary positions and a window. The model's code takes n from the length of the
call. That is right in one full pass, and wrong with a cache or padding: `patch` lets the scaling have the model's s.
Needs transformers 5.24 or newer.
"""

import math
import tempfile

import torch
from torch import nn
from torch.nn.functional import rms_norm
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

import tritonattn
from tritonattn.huggingface import patch

START = 1  # a token; 0 is padding
BOUND = 1e-4  # of logits with a cache, relative to the largest: fp32 sums in another order


class HybridConfig(LlamaConfig):
    model_type = "small_hybrid"


class HeadNorm(nn.Module):
    """QK-norm over D, with gains of each head."""

    def __init__(self, heads, head_dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, head_dim))

    def forward(self, x):  # [B, S, H, D]
        return rms_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype) * self.weight


class HybridAttention(nn.Module):
    is_causal = True

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.is_full = config.layer_types[layer_idx] == "full_attention"
        self.sliding_window = None if self.is_full else config.sliding_window
        width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.num_key_value_groups = width // heads, heads // kv_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=False)
        self.q_norm, self.k_norm = HeadNorm(heads, self.head_dim), HeadNorm(kv_heads, self.head_dim)
        self.ssmax_scale = nn.Parameter(torch.ones(heads)) if self.is_full else None
        self.g_proj = nn.Linear(width, heads * self.head_dim, bias=False) if self.is_full else None

    def forward(self, hidden_states, position_embeddings, attention_mask=None, cache=None, **kwargs):
        shape = hidden_states.shape[:-1]
        q = self.q_norm(self.q_proj(hidden_states).view(*shape, -1, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(hidden_states).view(*shape, -1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
        if not self.is_full:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if self.ssmax_scale is not None:  # s_h ln n, n from the length of this call
            n = torch.arange(1, shape[1] + 1, device=q.device)
            q = q * (self.ssmax_scale[:, None, None] * n.log()[:, None]).to(q.dtype)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        options = {"scaling": self.scaling, "sliding_window": self.sliding_window}
        out, weights = attend(self, q, k, v, attention_mask, **options, **kwargs)
        out = out.reshape(*shape, -1)
        if self.g_proj is not None:
            out = out * self.g_proj(hidden_states).float().sigmoid().to(out.dtype)
        return self.o_proj(out), weights


class HybridLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn, self.mlp = HybridAttention(config, layer_idx), LlamaMLP(config)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size)
        self.post_feedforward_layernorm = LlamaRMSNorm(config.hidden_size)

    def forward(self, x, **kwargs):
        x = x + self.post_attention_layernorm(self.self_attn(x, **kwargs)[0])
        return x + self.post_feedforward_layernorm(self.mlp(x))


class HybridPreTrainedModel(PreTrainedModel):
    config_class, base_model_prefix = HybridConfig, "model"
    _supports_sdpa = _supports_attention_backend = True


class HybridModel(HybridPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HybridLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm, self.rotary_emb = LlamaRMSNorm(config.hidden_size), LlamaRotaryEmbedding(config)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, use_cache=None, **kwargs):
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        x = self.embed_tokens(input_ids)
        past = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(past, past + x.shape[1], device=x.device)
        position_ids = positions[None] if position_ids is None else position_ids
        given = {"config": self.config, "inputs_embeds": x, "attention_mask": attention_mask}
        given |= {"cache": cache, "position_ids": position_ids}
        masks = {"full_attention": create_causal_mask(**given)}
        masks["sliding_attention"] = create_sliding_window_causal_mask(**given)
        turns = self.rotary_emb(x, position_ids)
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            x = layer(x, position_embeddings=turns, attention_mask=masks[kind], cache=cache, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), cache=cache)


class HybridForCausalLM(HybridPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = HybridModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, labels=None, logits_to_keep=0, **kwargs):
        result = self.model(input_ids, **kwargs)
        logits = self.lm_head(result.last_hidden_state[:, -logits_to_keep:])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=result.cache)


def small_hybrid():
    kinds = ["sliding_attention", "full_attention"] * 2
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": len(kinds)}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": kinds, "sliding_window": 16}
    return HybridForCausalLM(HybridConfig(**sizes, **heads, initializer_range=0.1, pad_token_id=0))


def texts(rows, length, random):
    """Random tokens [rows, length] behind a start. The model is to name the first of them at each place."""
    tokens = torch.randint(START + 1, 64, (rows, length), generator=random)
    tokens[:, 0] = START
    return tokens


def train(model, steps):
    """The losses of steps; the parameters of scalings have no weight decay."""
    scalings = set(tritonattn.nn.scaling_parameters(model))
    weights = [x for x in model.parameters() if x not in scalings]
    groups = [{"params": weights}, {"params": list(scalings), "weight_decay": 0.0}]
    optimizer, random, losses = torch.optim.AdamW(groups, lr=3e-3), torch.Generator().manual_seed(0), []
    for _ in range(steps):
        tokens = texts(16, 48, random)
        losses.append(model(tokens, labels=tokens[:, 1:2].expand_as(tokens)).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return [loss.item() for loss in losses]


@torch.no_grad()
def stepwise(model, tokens, prompt):
    """Logits [B, S - prompt + 1, V] of the last token of a prompt and of all after it, one at a time, with a cache."""
    result = model(tokens[:, :prompt], use_cache=True, logits_to_keep=1)
    logits = [result.logits]
    for i in range(prompt, tokens.shape[1]):
        result = model(tokens[:, i : i + 1], cache=result.cache, use_cache=True)
        logits.append(result.logits)
    return torch.cat(logits, dim=1)


def error(found, expected):
    """The largest difference of logits, relative to the largest logit."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def main():
    torch.manual_seed(0)
    model = small_hybrid()
    patched = patch(model, scaling="ssmax", layers="global", parameters={"layers.*.self_attn.ssmax_scale": "s"})
    print(patched)
    losses = train(model.train(), 200)
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {len(losses)} steps")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = HybridForCausalLM.from_pretrained(folder).eval()  # patched, as it was saved
    patched.undo()
    plain = model.eval()  # the model's own code
    assert plain.state_dict().keys() == loaded.state_dict().keys()

    tokens = texts(2, 24, torch.Generator().manual_seed(1))
    tokens[0] = torch.cat([torch.zeros(8, dtype=torch.int64), tokens[0, :16]])  # padding on the left
    new = loaded.generate(tokens, attention_mask=(tokens > 0).long(), max_new_tokens=8, do_sample=False)[:, 24:]
    for row, generated in zip((tokens[0, 8:], tokens[1]), new, strict=True):
        for token in generated:  # one full pass a token, without padding
            assert plain(row[None]).logits[0, -1].argmax() == token
            row = torch.cat([row, token[None]])
    print("generate with a cache and padding says what full passes without padding say")

    for prompt in (48, 8192):
        tokens = texts(1, prompt + 16, torch.Generator().manual_seed(2))
        with torch.no_grad():
            whole = plain(tokens, logits_to_keep=17).logits  # in one pass the model's own n is right
        exact = f"ln {prompt + 1:,} = {math.log(prompt + 1):.2f}"
        for name, network in ((f"patched, {exact}", loaded), (f"its own code, ln 1 = 0 for {exact}", plain)):
            logits = stepwise(network, tokens, prompt)
            right = (logits[:, 1:].argmax(-1) == tokens[:, 1]).double().mean()
            off = error(logits[:, 1:], whole[:, 1:])
            print(f"steps after {prompt:,} tokens, {name}: logits off by {off:.0e}, {right:.0%} right")
            assert (off < BOUND) == (network is loaded)


if __name__ == "__main__":
    main()
