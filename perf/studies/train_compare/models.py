"""Small transformers around `ScaledAttention`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tritonattn.nn import ScaledAttention

from .modes import build


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model, and the mode of its attention layers; qk_norm: q and k are RMS-normalised."""

    width: int
    heads: int
    blocks: int
    qk_norm: bool = False
    mode: str = "sqrt_dim"

    def attention(self, keys: int, *, causal: bool = False, rotary: float | None = None) -> ScaledAttention:
        """Make a layer; `keys` is the most keys that a row attends to in training."""
        scaling = build(self.mode, self.heads, self.width // self.heads, keys)
        options = {"causal": causal, "qk_norm": self.qk_norm, "rotary": rotary}
        return ScaledAttention(self.width, self.heads, scaling=scaling, **options)

    def head(self, classes: int) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(self.width), nn.Linear(self.width, classes))

    def positions(self, length: int) -> nn.Parameter:
        return nn.Parameter(0.02 * torch.randn(length, self.width))


class Block(nn.Module):
    """Attention over x, over a context where given one, and two layers; each on normalised features, and added."""

    def __init__(self, width: int, attention: ScaledAttention, cross: ScaledAttention | None = None) -> None:
        super().__init__()
        self.attention, self.cross = attention, cross
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.cross_norm = nn.Identity() if cross is None else nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, lengths: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """`lengths` are those of the context, or of x where there is none."""
        x = x + self.attention(self.attention_norm(x), key_lengths=lengths if self.cross is None else None)
        if self.cross is not None:
            x = x + self.cross(self.cross_norm(x), context, key_lengths=lengths)
        return x + self.feed(self.feed_norm(x))


class LanguageModel(nn.Module):
    """Next symbols from symbols [B, S]: logits [B, S, vocabulary]."""

    def __init__(self, sizes: Sizes, vocabulary: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, sizes.width)
        with warnings.catch_warnings():  # rotary layers with a factor that grows are what the text task compares
            warnings.filterwarnings("ignore", "rotary: ")
            layers = [sizes.attention(length, causal=True, rotary=1e4) for _ in range(sizes.blocks)]
        self.blocks = nn.Sequential(*(Block(sizes.width, layer) for layer in layers))
        self.head = sizes.head(vocabulary)

    def forward(self, symbols: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(symbols)))


class ImageClassifier(nn.Module):
    """Classes of grey images [B, side, side], cut into patches: logits [B, classes]."""

    def __init__(self, sizes: Sizes, side: int, patch: int, classes: int) -> None:
        super().__init__()
        self.patch, patches = patch, (side // patch) ** 2
        self.embedding = nn.Linear(patch * patch, sizes.width)
        self.positions = sizes.positions(patches)
        self.blocks = nn.Sequential(*(Block(sizes.width, sizes.attention(patches)) for _ in range(sizes.blocks)))
        self.head = sizes.head(classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch)
        x = self.embedding(patches.flatten(3).flatten(1, 2)) + self.positions
        return self.head(self.blocks(x).mean(1))


class EncoderDecoder(nn.Module):
    """Next target symbols: source [B, Ss] of lengths [B], shifted target [B, St]; logits [B, St, vocabulary].

    vocabularies, longest   of the source and of the target
    """

    def __init__(self, sizes: Sizes, vocabularies: tuple[int, int], longest: tuple[int, int]) -> None:
        super().__init__()
        self.source, self.target = (nn.Embedding(count, sizes.width) for count in vocabularies)
        self.source_positions, self.target_positions = map(sizes.positions, longest)
        width, count, (source, target) = sizes.width, range(sizes.blocks), longest
        self.encoder = nn.ModuleList(Block(width, sizes.attention(source)) for _ in count)
        self.decoder = nn.ModuleList(
            Block(width, sizes.attention(target, causal=True), sizes.attention(source)) for _ in count
        )
        self.head = sizes.head(vocabularies[1])

    def forward(self, source: Tensor, lengths: Tensor, shifted: Tensor) -> Tensor:
        x = self.source(source) + self.source_positions[: source.shape[1]]
        for block in self.encoder:
            x = block(x, lengths)
        y = self.target(shifted) + self.target_positions[: shifted.shape[1]]
        for block in self.decoder:
            y = block(y, lengths, x)
        return self.head(y)


class Recaller(nn.Module):
    """Values of asked keys [B, Q, symbols] among keys [B, n, symbols] with values [B, n], lengths [B]: [B, Q, values].

    One layer of cross attention: the asked keys are its queries, the pairs its keys and values.
    """

    def __init__(self, sizes: Sizes, symbols: int, positions: int, values: int, pairs: int) -> None:
        super().__init__()
        width = sizes.width
        self.symbols = nn.Embedding(positions * symbols, width)
        self.values = nn.Embedding(values, width)
        self.register_buffer("offsets", torch.arange(positions) * symbols)
        self.asked_norm, self.pair_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = sizes.attention(pairs)
        self.head = sizes.head(values)

    def forward(self, keys: Tensor, values: Tensor, lengths: Tensor, asked: Tensor) -> Tensor:
        pairs = self.pair_norm(self._embedded(keys) + self.values(values))
        return self.head(self.attention(self.asked_norm(self._embedded(asked)), pairs, key_lengths=lengths))

    def _embedded(self, keys: Tensor) -> Tensor:
        return self.symbols(keys + self.get_buffer("offsets")).sum(-2)
