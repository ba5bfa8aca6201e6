"""The scalings written without a kernel for them: q times a factor, in torch, before the call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import tritonattn
from tritonattn.core.statistics import Statistics
from tritonattn.core.visibility import Visibility
from tritonattn.scaling.counts import OfCount

from .contest import Unavailable


@dataclass(frozen=True)
class Keys:
    """Inputs of a recipe: head_dim, the number n of visible keys [Sq] or [1], and k in fp32."""

    head_dim: int
    n: Tensor
    k: Tensor
    q_len: int
    causal: bool

    def total(self, power: int) -> Tensor:
        """Sum ||k||^power over the visible keys: [B, Hkv, Sq] or [B, Hkv, 1]."""
        norms = self.k.norm(dim=-1) ** power
        return norms.cumsum(-1)[..., -self.q_len :] if self.causal else norms.sum(-1, keepdim=True)

    def longest(self) -> Tensor:
        """Find the largest ||k|| of the visible keys, likewise."""
        norms = self.k.norm(dim=-1)
        return norms.cummax(-1).values[..., -self.q_len :] if self.causal else norms.amax(-1, keepdim=True)


@dataclass(frozen=True)
class Visible:
    """The keys that rows attend to: ranges from lo to hi, int64 [Sq] or [B, 1, Sq], or None where a mask has holes.

    mask   bool, that fits [B, H, Sq, Sk], or None where no call needs one
    """

    lo: Tensor | None
    hi: Tensor | None
    mask: Tensor | None

    @property
    def counts(self) -> Tensor:
        if self.lo is None or self.hi is None:
            assert self.mask is not None
            return self.mask.sum(-1).float()
        return (self.hi - self.lo).float()

    def total(self, x: Tensor) -> Tensor:
        """Sum x [B, H, Sk] over the keys of each row: [B, H, Sq]."""
        if self.lo is None or self.hi is None:
            assert self.mask is not None
            return x @ self.mask.to(x.dtype).mT
        sums = torch.nn.functional.pad(x.double().cumsum(-1), (1, 0))
        lo, hi = (bound.expand(*x.shape[:2], -1) for bound in (self.lo, self.hi))
        return (sums.gather(-1, hi) - sums.gather(-1, lo)).to(x.dtype)


CONSTANTS: dict[str, Callable[[int], float]] = {
    "sqrt_dim": lambda dim: dim**-0.5,
    "dim": lambda dim: 1 / dim,
    "none": lambda dim: 1.0,
}
_ROWS: dict[str, Callable[[Keys | KeysUnderMask], Tensor]] = {  # and those of `OfCount`
    "key_count": lambda keys: 1 / keys.n,
    "sqrt_key_count": lambda keys: keys.n**-0.5,
    "key_norm_sum": lambda keys: 1 / keys.total(1),
    "key_norm_mean": lambda keys: keys.n / keys.total(1),
    "key_norm_rms": lambda keys: (keys.n / keys.total(2)).sqrt(),
    "key_norm_max": lambda keys: 1 / keys.longest(),
    "key_norm_l2": lambda keys: keys.total(2).rsqrt(),
}


@dataclass(frozen=True)
class KeysUnderMask:
    """Inputs of a recipe as of `Keys`, under any mask: k in fp32 [B, H, Sk, D], and the keys that rows attend to."""

    k: Tensor
    visible: Visible

    @property
    def head_dim(self) -> int:
        return self.k.shape[-1]

    @property
    def n(self) -> Tensor:
        return self.visible.counts

    def total(self, power: int) -> Tensor:
        """Sum ||k||^power over the keys of each row: [B, H, Sq]."""
        return self.visible.total(self.k.norm(dim=-1) ** power)


def rows_by_hand(scaling: str, k: Tensor, visible: Visible) -> Tensor:
    """The factor of a mode under any mask, fp32 that fits [B, H, Sq], for k [B, H, Sk, D]."""
    if scaling in CONSTANTS or scaling == "key_norm_max" or not has_recipe(scaling):
        raise Unavailable(f"no recipe for {scaling} under any mask")
    return _rows(scaling, KeysUnderMask(k.float(), visible))


def has_recipe(scaling: str) -> bool:
    return scaling in CONSTANTS or scaling in _ROWS or _of_count(scaling) is not None


def _of_count(scaling: str) -> OfCount | None:
    """A mode whose factor is a function of n, which takes n in fp32 too."""
    cls = tritonattn.SCALINGS[scaling]
    return cls() if issubclass(cls, OfCount) and not cls.about.reads_norms else None


def _rows(scaling: str, keys: Keys | KeysUnderMask) -> Tensor:
    if mode := _of_count(scaling):
        return mode._of_count(keys.n) * mode._constant(keys.head_dim)
    return _ROWS[scaling](keys)


def factor(scaling: str, q: Tensor, k: Tensor, causal: bool) -> float | Tensor:
    """Compute the factor for q [B, H, Sq, D] and k [B, Hkv, Sk, D], Sq <= Sk: a float, or fp32 that fits [B, H, Sq]."""
    dim, (q_len, k_len) = q.shape[-1], (q.shape[2], k.shape[2])
    if scaling in CONSTANTS:
        return CONSTANTS[scaling](dim)
    if not has_recipe(scaling):
        raise Unavailable(f"no recipe for {scaling}: it multiplies more than q")
    first = k_len - q_len + 1 if causal else k_len
    n = torch.arange(first, k_len + 1, device=k.device, dtype=torch.float32)
    rows = _rows(scaling, Keys(dim, n, k.float(), q_len, causal))
    group = q.shape[1] // k.shape[1]
    return rows if group == 1 or rows.dim() < 3 else rows.repeat_interleave(group, dim=1)


def prescaled(scaling: str, q: Tensor, k: Tensor, causal: bool) -> tuple[Tensor, float]:
    """Multiply q by the factor, rounded to q's dtype; a factor that is a number is returned as the call's scale."""
    multiplier = factor(scaling, q, k, causal)
    if isinstance(multiplier, float):
        return q, multiplier
    return (q * multiplier[..., None]).to(q.dtype), 1.0


def rows_of(scaling: str, q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """Compute the factor as fp32 [B, H, Sq], for a call that takes one a row."""
    multiplier = factor(scaling, q, k, causal)
    if isinstance(multiplier, float):
        return torch.full(q.shape[:3], multiplier, device=q.device)
    return multiplier.expand(q.shape[:3]).contiguous()


def scaled_by_mode(scaling: str, q: Tensor, k: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Multiply q by a mode's factor, and k by a mode's factor of keys, as the package computes them; rounded."""
    visibility = Visibility.of(q, k, causal=causal)
    scales = tritonattn.SCALINGS[scaling]().scales(q, k, visibility, Statistics(k, visibility))
    multiplier = scales.constant if scales.query is None else (scales.constant * scales.query.float())[..., None]
    keys = k if scales.key is None else (k * scales.key.float()[..., None]).to(k.dtype)
    return (q * multiplier).to(q.dtype), keys
