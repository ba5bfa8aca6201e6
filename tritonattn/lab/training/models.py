"""Small transformers around `ScaledAttention`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...nn import ScaledAttention
from .modes import build


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model: features, heads of an attention layer, and blocks; qk_norm: q and k are RMS-normalised."""

    width: int = 64
    heads: int = 4
    blocks: int = 2
    qk_norm: bool = False


@dataclass(frozen=True)
class Attentions:
    """A factory of a model's attention layers, all with one mode."""

    mode: str
    sizes: Sizes

    def __call__(self, keys: int, *, causal: bool = False, rotary: bool = False) -> ScaledAttention:
        """Make a layer; `keys` is the most keys that a row attends to in training."""
        width, heads = self.sizes.width, self.sizes.heads
        scaling = build(self.mode, heads, width // heads, keys)
        positions = 1e4 if rotary else None
        return ScaledAttention(
            width, heads, scaling=scaling, causal=causal, qk_norm=self.sizes.qk_norm, rotary=positions
        )


class Block(nn.Module):
    """Attention over x, over a context where given one, and two layers; each on normalised features, and added."""

    def __init__(self, width: int, attention: ScaledAttention, cross: ScaledAttention | None = None) -> None:
        super().__init__()
        self.attention, self.cross = attention, cross
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.cross_norm = None if cross is None else nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        context: Tensor | None = None,
        context_lengths: Tensor | None = None,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), key_lengths=lengths)
        if self.cross is not None and self.cross_norm is not None:
            x = x + self.cross(self.cross_norm(x), context, key_lengths=context_lengths)
        return x + self.feed(self.feed_norm(x))


class LanguageModel(nn.Module):
    """Next symbols from symbols [B, S]: logits [B, S, vocabulary]."""

    def __init__(self, attentions: Attentions, vocabulary: int, length: int) -> None:
        super().__init__()
        sizes = attentions.sizes
        self.embedding = nn.Embedding(vocabulary, sizes.width)
        self.blocks = nn.ModuleList(
            Block(sizes.width, attentions(length, causal=True, rotary=True)) for _ in range(sizes.blocks)
        )
        self.head = nn.Sequential(nn.LayerNorm(sizes.width), nn.Linear(sizes.width, vocabulary))

    def forward(self, symbols: Tensor) -> Tensor:
        x = self.embedding(symbols)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class ImageClassifier(nn.Module):
    """Classes of grey images [B, side, side], cut into patches: logits [B, classes]."""

    def __init__(self, attentions: Attentions, side: int, patch: int, classes: int) -> None:
        super().__init__()
        sizes, patches = attentions.sizes, (side // patch) ** 2
        self.patch = patch
        self.embedding = nn.Linear(patch * patch, sizes.width)
        self.positions = nn.Parameter(0.02 * torch.randn(patches, sizes.width))
        self.blocks = nn.ModuleList(Block(sizes.width, attentions(patches)) for _ in range(sizes.blocks))
        self.head = nn.Sequential(nn.LayerNorm(sizes.width), nn.Linear(sizes.width, classes))

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch)
        x = self.embedding(patches.flatten(3).flatten(1, 2)) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class EncoderDecoder(nn.Module):
    """Next target symbols: source [B, Ss] of lengths [B], shifted target [B, St]; logits [B, St, vocabulary].

    source_length, target_length   the longest of both
    """

    def __init__(
        self, attentions: Attentions, vocabularies: tuple[int, int], source_length: int, target_length: int
    ) -> None:
        super().__init__()
        sizes = attentions.sizes
        self.source, self.target = (nn.Embedding(count, sizes.width) for count in vocabularies)
        self.source_positions, self.target_positions = (
            nn.Parameter(0.02 * torch.randn(length, sizes.width)) for length in (source_length, target_length)
        )
        self.encoder = nn.ModuleList(Block(sizes.width, attentions(source_length)) for _ in range(sizes.blocks))
        self.decoder = nn.ModuleList(
            Block(sizes.width, attentions(target_length, causal=True), attentions(source_length))
            for _ in range(sizes.blocks)
        )
        self.head = nn.Sequential(nn.LayerNorm(sizes.width), nn.Linear(sizes.width, vocabularies[1]))

    def forward(self, source: Tensor, lengths: Tensor, shifted: Tensor) -> Tensor:
        x = self.source(source) + self.source_positions[: source.shape[1]]
        for block in self.encoder:
            x = block(x, lengths)
        y = self.target(shifted) + self.target_positions[: shifted.shape[1]]
        for block in self.decoder:
            y = block(y, None, x, lengths)
        return self.head(y)


class Recaller(nn.Module):
    """Values of asked keys [B, Q, symbols] among keys [B, n, symbols] with values [B, n], lengths [B]: [B, Q, values].

    One layer of cross attention: the asked keys are its queries, the pairs its keys and values.
    """

    def __init__(self, attentions: Attentions, symbols: int, positions: int, values: int, pairs: int) -> None:
        super().__init__()
        width = attentions.sizes.width
        self.symbols = nn.Embedding(positions * symbols, width)
        self.values = nn.Embedding(values, width)
        self.register_buffer("offsets", torch.arange(positions) * symbols)
        self.asked_norm, self.pair_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attentions(pairs)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, values))

    def forward(self, keys: Tensor, values: Tensor, lengths: Tensor, asked: Tensor) -> Tensor:
        pairs = self.pair_norm(self._embedded(keys) + self.values(values))
        return self.head(self.attention(self.asked_norm(self._embedded(asked)), pairs, key_lengths=lengths))

    def _embedded(self, keys: Tensor) -> Tensor:
        return self.symbols(keys + self.get_buffer("offsets")).sum(-2)
