"""Results that an engine must compute, by the papers' formulas, in numpy and float64: attention, and decoders.

Nothing here is of tritonattn, vLLM or transformers, but names of weights and of entries in a config.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np


@dataclass(frozen=True)
class Formula:
    """logit[i, j] = scale * sqrt(D) * gain * factor[i, j] * (q[i] . k[j]), and what else a layer does with it.

    mode      sqrt_dim, log_key_count (Chiang & Cholak 2022), ssmax with s and b (Nakanishi 2025), key_norm_mean (a mean
              in place of the sum of Bernhard 2023), or cosine (Henry et al. 2020, temperature sqrt(D), whatever the
              scale)
    gain, s, b   of each head, or one of all
    scale     the model's own, 1 / sqrt(D) where None
    window    keys that a row sees at most
    softcap   c tanh(logit / c)
    sinks     of each head: a logit that only joins the denominator
    """

    mode: str = "sqrt_dim"
    gain: Any = 1.0
    s: Any = 1.0
    b: Any = 0.0
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Any = None

    def factor(self, q: np.ndarray, k: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """q, k [Hq, S, D], seen [rows, keys] -> broadcastable to [Hq, rows, keys]."""
        dim, n = q.shape[-1], seen.sum(-1)[:, None]
        lengths = np.sqrt((k**2).sum(-1))[:, None]  # [Hq, 1, keys]
        if self.mode == "cosine":
            return np.sqrt(dim) / (np.sqrt((q**2).sum(-1))[..., None] * lengths)
        if self.mode == "key_norm_mean":
            return n / (lengths * seen).sum(-1, keepdims=True)
        times = {"sqrt_dim": 1.0, "log_key_count": np.log(n), "ssmax": by_head(self.s) * np.log(n) + by_head(self.b)}
        return times[self.mode] / np.sqrt(dim)

    def attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """The last rows of a sequence, causal: q [rows, Hq, D], k and v [S, Hkv, D] -> [rows, Hq, D]."""
        q, k, v = (np.moveaxis(np.asarray(x, np.float64), 1, 0) for x in (q, k, v))
        k, v = (np.repeat(x, len(q) // len(k), 0) for x in (k, v))
        ahead = np.arange(k.shape[1]) - np.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]
        seen = (ahead <= 0) & (-ahead < (self.window or k.shape[1]))
        own = 1.0 if self.scale is None or self.mode == "cosine" else self.scale * np.sqrt(q.shape[-1])
        logits = own * by_head(self.gain) * self.factor(q, k, seen) * (q @ k.swapaxes(1, 2))
        if self.softcap:
            logits = self.softcap * np.tanh(logits / self.softcap)
        logits = np.where(seen, logits, -np.inf)
        if self.sinks is not None:
            column = np.broadcast_to(by_head(self.sinks), (*logits.shape[:2], 1))
            logits, v = np.concatenate([logits, column], -1), np.pad(v, [(0, 0), (0, 1), (0, 0)])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return np.moveaxis(weights / weights.sum(-1, keepdims=True) @ v, 0, 1)


def by_head(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64).reshape(-1, 1, 1)


@dataclass(frozen=True)
class Decoder:
    """A Llama, Mistral or Gemma 2, from its config and weights and the formulas of its layers.

    Sources: Touvron et al. 2023, arXiv:2302.13971; Jiang et al. 2023, arXiv:2310.06825; Gemma team 2024,
    arXiv:2408.00118.
    """

    TYPES: ClassVar = ("llama", "mistral", "gemma2")
    config: Any
    weights: dict[str, np.ndarray] = field(repr=False)
    formulas: list[Formula]

    def __call__(self, tokens: list[int]) -> np.ndarray:
        """Logits [S, vocabulary]."""
        embedded = self.weights["model.embed_tokens.weight"]
        x = embedded[tokens] * (np.sqrt(self.config.hidden_size) if self.is_gemma else 1.0)
        for i, formula in enumerate(self.formulas):
            layer = f"model.layers.{i}"
            x = x + self.after(layer, "post_attention", self.attention(layer, self.norm(layer, "input", x), formula))
            before = "pre_feedforward" if self.is_gemma else "post_attention"
            x = x + self.after(layer, "post_feedforward", self.feed(layer, self.norm(layer, before, x)))
        return self.norm("model", "", x) @ self.weights.get("lm_head.weight", embedded).T

    @property
    def is_gemma(self) -> bool:
        return self.config.model_type == "gemma2"

    def after(self, layer: str, name: str, x: np.ndarray) -> np.ndarray:
        return self.norm(layer, name, x) if self.is_gemma else x

    def norm(self, layer: str, name: str, x: np.ndarray) -> np.ndarray:
        weight = self.weights[f"{layer}.{name}_layernorm.weight" if name else f"{layer}.norm.weight"]
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config.rms_norm_eps) * (weight + self.is_gemma)

    def feed(self, layer: str, x: np.ndarray) -> np.ndarray:
        gate, up = (x @ self.weights[f"{layer}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        if self.is_gemma:
            gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        else:
            gate = gate / (1 + np.exp(-gate))
        return (gate * up) @ self.weights[f"{layer}.mlp.down_proj.weight"].T

    def attention(self, layer: str, x: np.ndarray, formula: Formula) -> np.ndarray:
        q, k, v = (
            (x @ self.weights[f"{layer}.self_attn.{name}_proj.weight"].T).reshape(len(x), -1, self.config.head_dim)
            for name in "qkv"
        )
        out = formula.attend(self.turned(q), self.turned(k), v)
        return out.reshape(len(x), -1) @ self.weights[f"{layer}.self_attn.o_proj.weight"].T

    def turned(self, x: np.ndarray) -> np.ndarray:
        """Rotary positions: Su et al. 2021, arXiv:2104.09864; entry d turns with entry d + D / 2."""
        half = x.shape[-1] // 2
        angle = np.arange(len(x))[:, None] * self.config.rope_parameters["rope_theta"] ** (-np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
