"""An encoder-decoder that writes numbers in words."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models import Attentions, EncoderDecoder, Sizes
from ..records import Recipe
from .base import IGNORED, Batch, Task

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = ("<end>", *ONES, *TENS, "hundred", "thousand", "<start>")
_END, _START = 0, len(WORDS) - 1
_DIGITS = 6
_LONGEST = 10  # "three hundred seventy three thousand three hundred seventy three", and the end


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

    def model(self, attentions: Attentions) -> nn.Module:
        return EncoderDecoder(attentions, (10, len(WORDS)), _DIGITS, _LONGEST)

    def batch(self, size: int, random: torch.Generator) -> Batch:
        return _batch(_numbers(size, random, held_out=False))

    def held_out(self) -> Batch:
        return _batch(_numbers(256, torch.Generator().manual_seed(1), held_out=True))

    def final(self, model: nn.Module, device: torch.device, quick: bool) -> dict[str, float]:
        numbers = _numbers(64 if quick else 1024, torch.Generator().manual_seed(2), held_out=True)
        batch = _batch(numbers).to(device)
        counts = batch.target != IGNORED
        right = model(**batch.inputs).argmax(-1) == batch.target
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
    size = numbers.shape[0]
    source = torch.zeros(size, _DIGITS, dtype=torch.int64)
    lengths = torch.zeros(size, dtype=torch.int64)
    target = torch.full((size, _LONGEST), IGNORED)
    for row, number in enumerate(numbers.tolist()):
        digits = [int(digit) for digit in str(number)]
        words = [*(WORDS.index(word) for word in spelled(number)), _END]
        source[row, : len(digits)] = torch.tensor(digits)
        lengths[row] = len(digits)
        target[row, : len(words)] = torch.tensor(words)
    shifted = torch.cat([torch.full((size, 1), _START), target[:, :-1].clamp(min=_END)], dim=1)
    return Batch({"source": source, "lengths": lengths, "shifted": shifted}, target)
