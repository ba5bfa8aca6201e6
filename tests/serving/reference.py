"""Results that a layer must compute, by the papers' formulas, in numpy and float64; nothing here is of tritonattn."""

from dataclasses import dataclass
from typing import Any

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
