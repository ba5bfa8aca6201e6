"""A small GPT whose layers are a string of kinds, with a scaling of the library in those over all keys, or in all.

w   rotary positions, a window of the last keys
n   all keys before, no positions
r   all keys before, rotary positions
p   all keys before, rotary positions in a quarter of each head's channels
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritonattn import SCALINGS, Scaling
from tritonattn.calls.dispatch import scales_of
from tritonattn.core.statistics import Statistics
from tritonattn.core.visibility import Visibility
from tritonattn.nn import SSMax

HEAD_DIM = 32
GLOBAL = "nrp"
_BLOCK = 64  # queries of a block in a windowed layer
_SHORT = 256  # up to here products are faster than PyTorch's kernel, whose backward is slow on a CPU


@dataclass(frozen=True)
class Factor:
    """A scaling's name, as `named` takes it, and a constant times it."""

    name: str = "sqrt_dim"
    gain: float = 1.0

    def of(self, heads: int, length: int) -> Scaling:
        """The scaling, whose base is the trained length."""
        if self.name == "ssmax":
            return SSMax(heads, length)
        return SCALINGS[self.name](*() if self.name == "sqrt_dim" else (length,))


@dataclass(frozen=True)
class Shape:
    """The shape of a model, but for its vocabulary: see the options of the command.

    layers    kinds, from the first layer on
    factor    in layers over all keys; `where` "all": in windowed ones too
    qk_norm   "plain", "gain" (a learned vector on q and on k) or "none"
    window    keys that a windowed layer sees, the row's own included
    theta     base of the rotary positions over all keys; 10 in windows
    """

    layers: str
    factor: Factor = Factor()
    where: str = "global"
    qk_norm: str = "plain"
    window: int = 4
    theta: float = 10_000.0
    width: int = 64

    @property
    def heads(self) -> int:
        return self.width // HEAD_DIM


@functools.cache
def _rotations(length: int, theta: float, channels: int) -> tuple[Tensor, Tensor]:
    turns = torch.arange(length)[:, None] * theta ** (-torch.arange(0, channels, 2) / channels)
    return turns.cos(), turns.sin()


def rotated(x: Tensor, theta: float, channels: int = HEAD_DIM) -> Tensor:
    """x [B, H, T, D], its first channels turned by their positions."""
    cosine, sine = _rotations(x.shape[-2], theta, channels)
    left, right = x[..., :channels].chunk(2, -1)
    return torch.cat([left * cosine - right * sine, left * sine + right * cosine, x[..., channels:]], -1)


class Attention(nn.Module):
    """One layer; `scaling`, `gain` and `theta` may be exchanged in a trained model.

    The factor is the library's, in fp32 on q. The products are PyTorch's, which at these sizes are faster on a CPU;
    a test holds the result to `tritonattn.attention`.
    """

    def __init__(self, kind: str, shape: Shape, length: int) -> None:
        super().__init__()
        has_factor = kind in GLOBAL or shape.where == "all"
        factor = shape.factor if has_factor else Factor()
        self.kind, self.heads = kind, shape.heads
        self.window = shape.window if kind == "w" else None
        self.theta = {"w": 10.0, "r": shape.theta, "p": shape.theta}.get(kind)
        self.turned = HEAD_DIM // 4 if kind == "p" else HEAD_DIM
        self.scaling, self.gain = factor.of(self.heads, length), factor.gain
        self.normalises = shape.qk_norm != "none"
        self.gains = nn.Parameter(torch.ones(2, HEAD_DIM)) if shape.qk_norm == "gain" else None
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B, H, T, D] of x [B, T, width], normalised and turned."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        if self.normalises:
            q, k = F.rms_norm(q, (HEAD_DIM,)), F.rms_norm(k, (HEAD_DIM,))
        if self.gains is not None:
            q, k = q * self.gains[0], k * self.gains[1]
        if self.theta is not None:
            q, k = rotated(q, self.theta, self.turned), rotated(k, self.theta, self.turned)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(*self.heads_of(x)).transpose(1, 2).flatten(-2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = None if self.window is None else (self.window - 1, 0)
        visibility = Visibility.of(q, k, causal=True, window=window)
        scales = scales_of(self.scaling, self.gain, q, k, visibility, Statistics(k, visibility))
        q = q * scales.constant if scales.query is None else q * (scales.constant * scales.query[..., None])
        if self.window is not None:
            return windowed(q, k, v, self.window)
        if q.shape[-2] > _SHORT:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        return (q @ k.transpose(-1, -2) + _hidden(q.shape[-2], q.shape[-2], q.shape[-2])).softmax(-1) @ v


@functools.cache
def _hidden(rows: int, keys: int, window: int) -> Tensor:
    """-inf where a row, the last of them at the last key, does not see a key, else 0."""
    distance = torch.arange(keys - rows, keys)[:, None] - torch.arange(keys)
    return torch.zeros(rows, keys).masked_fill((distance < 0) | (distance >= window), -torch.inf)


def windowed(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention, factor already in q, in a window of at most a block, by blocks of rows next to two blocks of keys."""
    length = q.shape[-2]
    if length <= _BLOCK:
        return (q @ k.transpose(-1, -2) + _hidden(length, length, window)).softmax(-1) @ v
    rows = q.unflatten(-2, (-1, _BLOCK))
    keys, values = (_with_block_before(x) for x in (k, v))
    hidden = _hidden(_BLOCK, 2 * _BLOCK, window).repeat(length // _BLOCK, 1, 1)
    hidden[0, :, :_BLOCK] = -torch.inf
    return ((rows @ keys.transpose(-1, -2) + hidden).softmax(-1) @ values).flatten(-3, -2)


def _with_block_before(x: Tensor) -> Tensor:
    blocks = x.unflatten(-2, (-1, _BLOCK))
    return torch.cat([F.pad(blocks, (0, 0, 0, 0, 1, 0))[..., :-1, :, :], blocks], -2)


class GPT(nn.Module):
    def __init__(self, shape: Shape, vocabulary: int, length: int, spread: float) -> None:
        super().__init__()
        width = shape.width
        self.tokens = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.tokens.weight, std=spread)
        self.attention = nn.ModuleList(Attention(kind, shape, length) for kind in shape.layers)
        self.up = nn.ModuleList(nn.Linear(width, 2 * width, bias=False) for _ in shape.layers)
        self.down = nn.ModuleList(nn.Linear(2 * width, width, bias=False) for _ in shape.layers)
        self.head = nn.Linear(width, vocabulary, bias=False)

    @property
    def layers(self) -> list[Attention]:
        return [layer for layer in self.attention if isinstance(layer, Attention)]

    def forward(self, tokens: Tensor, asked: Tensor) -> Tensor:
        """Logits of the next token, at the places of [B, T] that are asked for."""
        x = self.tokens(tokens)
        for attention, up, down in zip(self.attention, self.up, self.down, strict=True):
            x = x + attention(F.rms_norm(x, x.shape[-1:]))
            x = x + down(F.relu(up(F.rms_norm(x, x.shape[-1:]))))
        return self.head(F.rms_norm(x[asked], x.shape[-1:]))


@dataclass(frozen=True)
class Swap:
    """A change of a trained model at test alone, in its layers over all keys.

    name      in the results; "" is the model as it was trained
    factor    None keeps the trained one
    stretch   the rotary base is stretched for the multiple that is tested ("NTK-aware": base * m^(D / (D - 2)),
              D the channels that are turned)
    """

    name: str = ""
    factor: Factor | None = None
    stretch: bool = False


@contextmanager
def swapped(model: GPT, swap: Swap, multiple: int, length: int) -> Iterator[None]:
    layers = [layer for layer in model.layers if layer.kind in GLOBAL]
    trained = [(layer.scaling, layer.gain, layer.theta) for layer in layers]
    for layer in layers:
        if swap.factor is not None:
            layer.scaling, layer.gain = swap.factor.of(layer.heads, length), swap.factor.gain
        if swap.stretch and layer.theta is not None:
            layer.theta = layer.theta * multiple ** (layer.turned / (layer.turned - 2))
    try:
        yield
    finally:
        for layer, kept in zip(layers, trained, strict=True):
            layer.scaling, layer.gain, layer.theta = kept
