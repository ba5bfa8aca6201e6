"""Small tasks on which scalings can be compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..texts import WONDERLAND
from .models import EncoderDecoder, ImageClassifier, LanguageModel, Recaller, Sizes
from .records import Recipe

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """A model's arguments, and the right classes; IGNORED ones do not count."""

    inputs: dict[str, Tensor]
    target: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch({name: x.to(device) for name, x in self.inputs.items()}, self.target.to(device))


class Task(ABC):
    """A model, its data, and its measures.

    metric    the measure of `final` that decides, higher_is_better or not
    target    a held-out loss; the steps until it is reached are counted
    recipe    the default training
    """

    name: str
    metric: str
    higher_is_better = True
    target: float
    sizes: Sizes
    recipe: Recipe

    @abstractmethod
    def model(self, sizes: Sizes) -> nn.Module: ...

    @abstractmethod
    def batch(self, size: int, random: torch.Generator) -> Batch:
        """Draw a batch of the training part; it depends on random only."""

    @abstractmethod
    def held_out(self) -> Batch:
        """Return the held-out batch, the same for every mode and seed, with nothing of a training batch."""

    @abstractmethod
    def final(self, model: nn.Module, device: torch.device, quick: bool) -> dict[str, float]:
        """Measure a trained model: `metric` and others by name; where quick, on less data."""


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the mean cross entropy, in nats."""
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=IGNORED)


def _right(model: nn.Module, batch: Batch) -> Tensor:
    """Compare the likeliest class with the target: bool, of the target's shape."""
    return model(**batch.inputs).argmax(-1) == batch.target


class Text(Task):
    """Predict bytes of Alice's Adventures in Wonderland from up to 128 before; the last tenth is held out.

    loss_<n>   nats a byte on the held-out tenth, at the last 64 positions of windows of n bytes, which all end alike:
               n = 128 as in training, and 256 and 512, with contexts longer than in training
    """

    name, metric, higher_is_better = "text", "loss_128", False
    target = 2.25
    sizes = Sizes(width=64, heads=4, blocks=2)
    recipe = Recipe("adamw", 5e-3, weight_decay=0.01, steps=200, batch=16)
    length = 128
    counted = 64

    @cached_property
    def bytes(self) -> tuple[Tensor, Tensor]:
        """int64: the training part, and the held-out tenth."""
        text = torch.tensor(list(WONDERLAND.read_bytes()))
        cut = len(text) * 9 // 10
        return text[:cut], text[cut:]

    def model(self, sizes: Sizes) -> nn.Module:
        return LanguageModel(sizes, 128, self.length)  # the book is plain ASCII

    def batch(self, size: int, random: torch.Generator) -> Batch:
        train, _ = self.bytes
        return _shifted(train, torch.randint(len(train) - self.length, (size,), generator=random), self.length)

    def held_out(self) -> Batch:
        _, held_out = self.bytes
        return _shifted(held_out, torch.linspace(0, len(held_out) - self.length - 1, 16).long(), self.length)

    def final(self, model: nn.Module, device: torch.device, quick: bool) -> dict[str, float]:
        _, held_out = self.bytes
        ends = torch.arange(512, len(held_out) - 1, 2 * self.counted)[: 8 if quick else None]
        found = {}
        for n in (self.length, 256, 512):
            total = 0.0
            for some in ends.split(32):
                batch = _shifted(held_out, some - n, n).to(device)
                logits, target = (x[:, -self.counted :] for x in (model(**batch.inputs), batch.target))
                total += float(F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum"))
            found[f"loss_{n}"] = total / (len(ends) * self.counted)
        return found


def _shifted(text: Tensor, starts: Tensor, length: int) -> Batch:
    windows = text[starts[:, None] + torch.arange(length + 1)]  # [B, length + 1]
    return Batch({"symbols": windows[:, :-1]}, windows[:, 1:])


class Digits(Task):
    """Classes of scikit-learn's 1,797 digits of 8 x 8 pixels, 16 patches each; every fourth is held out.

    accuracy   on the held-out quarter
    """

    name, metric = "digits", "accuracy"
    target = 0.5
    sizes = Sizes(width=32, heads=2, blocks=2)
    recipe = Recipe("adamw", 1e-2, weight_decay=0.01, steps=300, batch=64)

    @cached_property
    def parts(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(images [N, 8, 8] from 0 to 1, classes [N]) of the training part and of the held-out one."""
        from sklearn.datasets import load_digits

        images, classes = load_digits(return_X_y=True)
        x = torch.tensor(images, dtype=torch.float32).unflatten(1, (8, 8)) / 16
        y = torch.tensor(classes, dtype=torch.int64)
        out = torch.arange(len(x)) % 4 == 3
        return (x[~out], y[~out]), (x[out], y[out])

    def model(self, sizes: Sizes) -> nn.Module:
        return ImageClassifier(sizes, side=8, patch=2, classes=10)

    def batch(self, size: int, random: torch.Generator) -> Batch:
        (images, classes), _ = self.parts
        chosen = torch.randint(len(images), (size,), generator=random)
        return Batch({"images": images[chosen]}, classes[chosen])

    def held_out(self) -> Batch:
        _, (images, classes) = self.parts
        return Batch({"images": images}, classes)

    def final(self, model: nn.Module, device: torch.device, quick: bool) -> dict[str, float]:
        return {"accuracy": float(_right(model, self.held_out().to(device)).double().mean())}


ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = ("<end>", *ONES, *TENS, "hundred", "thousand", "<start>")
_END, _START = 0, len(WORDS) - 1
_DIGITS = 6
_MOST_WORDS = 10  # "three hundred seventy three thousand three hundred seventy three", and the end


def spelled(number: int) -> list[str]:
    """Spell a number from 0 to 999,999: 1407 is one thousand four hundred seven."""
    if number < 20:
        return [ONES[number]]
    for size, word in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            return [*spelled(number // size), word, *(spelled(number % size) if number % size else [])]
    return [TENS[number // 10 - 2], *([ONES[number % 10]] if number % 10 else [])]


class Spell(Task):
    """Write a number's digits in English words: lengths vary from 1 to 6 and from 2 to 10, in padded batches.

    Every number that is 3 modulo 11 is held out; all lengths are equally likely.

    exact   share of held-out numbers with every word right. A word is predicted after right ones; where all are right,
            a greedy decoder writes the same words.
    words   share of right words after right ones
    """

    name, metric = "spell", "exact"
    target = 0.25
    sizes = Sizes(width=64, heads=4, blocks=1)
    recipe = Recipe("adamw", 5e-3, weight_decay=0.01, steps=300, batch=64)

    def model(self, sizes: Sizes) -> nn.Module:
        return EncoderDecoder(sizes, (10, len(WORDS)), (_DIGITS, _MOST_WORDS))

    def batch(self, size: int, random: torch.Generator) -> Batch:
        return _batch(_numbers(size, random, held_out=False))

    def held_out(self) -> Batch:
        return _batch(_numbers(256, torch.Generator().manual_seed(1), held_out=True))

    def final(self, model: nn.Module, device: torch.device, quick: bool) -> dict[str, float]:
        numbers = _numbers(64 if quick else 1024, torch.Generator().manual_seed(2), held_out=True)
        batch = _batch(numbers).to(device)
        counts = batch.target != IGNORED
        right = _right(model, batch)
        return {
            "exact": float((right | ~counts).all(-1).double().mean()),
            "words": float(right[counts].double().mean()),
        }


def _numbers(size: int, random: torch.Generator, *, held_out: bool) -> Tensor:
    """Draw numbers [size] of the training part or of the held-out one."""
    digits = torch.randint(1, _DIGITS + 1, (size,), generator=random)
    lowest = torch.where(digits == 1, 0, 10 ** (digits - 1))
    within = torch.rand(size, generator=random, dtype=torch.float64) * (10**digits - lowest - 1)
    numbers = lowest + within.long()
    if held_out:  # the next one held out, or the one before where the next has a digit more
        numbers = numbers + (3 - numbers) % 11
        return torch.where(numbers < 10**digits, numbers, numbers - 11)
    return torch.where(numbers % 11 == 3, numbers + 1, numbers)


def _batch(numbers: Tensor) -> Batch:
    digits = [[int(digit) for digit in str(number)] for number in numbers.tolist()]
    words = [[*map(WORDS.index, spelled(number)), _END] for number in numbers.tolist()]
    source = torch.tensor([row + [0] * (_DIGITS - len(row)) for row in digits])
    target = torch.tensor([row + [IGNORED] * (_MOST_WORDS - len(row)) for row in words])
    shifted = F.pad(target[:, :-1].clamp(min=_END), (1, 0), value=_START)
    return Batch({"source": source, "lengths": torch.tensor([*map(len, digits)]), "shifted": shifted}, target)


_SYMBOLS, _POSITIONS, _VALUES = 16, 4, 16
_ASKED = 16
_LONGEST = 64
LENGTHS = (16, 64, 256, 1024, 4096)  # in testing


class Lookup(Task):
    """Find a value among n pairs of keys and values, with one layer of attention and no positions.

    Training tables have `shortest` to 64 pairs, padded to 64; test tables up to 4,096.

    test   batches and tables in a batch of a length in testing

    accuracy_<n>   share of right values in tables of n pairs
    """

    metric = "accuracy_4096"
    sizes = Sizes(width=64, heads=4, blocks=1)
    shortest: int
    test: tuple[int, int]

    @abstractmethod
    def tables(self, lengths: Tensor, longest: int, random: torch.Generator) -> Batch:
        """Draw one table per row of `lengths`, each padded to `longest` pairs."""

    def batch(self, size: int, random: torch.Generator) -> Batch:
        lengths = torch.randint(self.shortest, _LONGEST + 1, (size,), generator=random)
        return self.tables(lengths, _LONGEST, random)

    def held_out(self) -> Batch:
        return self.batch(64, torch.Generator().manual_seed(1))

    def final(self, model: nn.Module, device: torch.device, quick: bool) -> dict[str, float]:
        random = torch.Generator().manual_seed(2)
        batches, size = (1, 4) if quick else self.test
        found = {}
        for n in LENGTHS:
            tables = (self.tables(torch.full((size,), n), n, random).to(device) for _ in range(batches))
            rights = [_right(model, batch).double().mean() for batch in tables]
            found[f"accuracy_{n}"] = float(torch.stack(rights).mean())
        return found


class Recall(Lookup):
    """Find the value of an asked key among n pairs of random keys and values.

    A key is 4 symbols out of 16, a value one out of 16, and no key is twice in a table. Among 4,096 pairs about 4 keys
    differ from the asked one in a single symbol. Chance is 1/16.
    """

    name = "recall"
    target = 0.25
    shortest, test = 16, (4, 16)
    recipe = Recipe("adamw", 5e-3, weight_decay=0.01, steps=250, batch=32)

    def model(self, sizes: Sizes) -> nn.Module:
        return Recaller(sizes, _SYMBOLS, _POSITIONS, _VALUES, _LONGEST)

    def tables(self, lengths: Tensor, longest: int, random: torch.Generator) -> Batch:
        size = lengths.shape[0]
        # Sorted numbers, each raised by its rank, are distinct; then shuffle them.
        drawn = torch.randint(_SYMBOLS**_POSITIONS - longest + 1, (size, longest), generator=random).sort(dim=1).values
        shuffled = torch.rand(size, longest, generator=random).argsort(dim=1)
        codes = (drawn + torch.arange(longest)).gather(1, shuffled)  # [B, longest]
        powers = _SYMBOLS ** torch.arange(_POSITIONS)
        keys = codes[..., None] // powers % _SYMBOLS  # [B, longest, positions]
        values = torch.randint(_VALUES, (size, longest), generator=random)
        chosen = (torch.rand(size, _ASKED, generator=random) * lengths[:, None]).long()  # [B, asked]
        rows = torch.arange(size)[:, None]
        inputs = {"keys": keys, "values": values, "lengths": lengths, "asked": keys[rows, chosen]}
        return Batch(inputs, values[rows, chosen])


class First(Lookup):
    """Give the first bit of a string of n bits: FIRST of Chiang & Cholak (2022, arXiv:2202.12172).

    The share of ones of a string is uniform in [0, 1], and its first bit is fair. Every pair's value is a bit; the
    first pair's key is 1, which is asked for, and all others are 0. Chance is 1/2.
    """

    name = "first"
    target = 0.1
    shortest, test = 4, (32, 16)
    recipe = Recipe("adamw", 5e-3, weight_decay=0.01, steps=250, batch=64)

    def model(self, sizes: Sizes) -> nn.Module:
        return Recaller(sizes, symbols=2, positions=1, values=2, pairs=_LONGEST)

    def tables(self, lengths: Tensor, longest: int, random: torch.Generator) -> Batch:
        size = lengths.shape[0]
        values = (torch.rand(size, longest, generator=random) < torch.rand(size, 1, generator=random)).long()
        values[:, 0] = torch.randint(2, (size,), generator=random)
        keys = torch.zeros(size, longest, 1, dtype=torch.int64)
        keys[:, 0] = 1
        return Batch({"keys": keys, "values": values, "lengths": lengths, "asked": keys[:, :1]}, values[:, :1])


TASKS: dict[str, Task] = {task.name: task for task in (Text(), Digits(), Spell(), Recall(), First())}
