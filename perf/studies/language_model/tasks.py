"""Two tasks: a ledger, whose answers lie anywhere before, and Python's standard library, whose words mostly do not."""

from __future__ import annotations

import functools
import hashlib
import re
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from tritonattn.lab.ledger import VOCABULARY, ledger

MULTIPLES = (1, 2, 4, 8, 16, 32)


class Ledger:
    """The records of `tritonattn.lab.ledger`."""

    vocabulary = VOCABULARY
    length = 64
    multiples = MULTIPLES

    def train(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return ledger(rows, self.length, generator)

    def test(self, multiple: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Sequences of a multiple of the trained length, the same for every run; at least 16."""
        length = multiple * self.length
        return ledger(max(16, tokens // length), length, torch.Generator().manual_seed(multiple))


class Code:
    """Python's standard library of this machine: byte-pair encoding of 1,024 tokens; a tenth of the files held out.

    Tests read held-out files from their beginning, so that all of a context is one file.
    """

    vocabulary = 1024
    length = 128
    multiples = (MULTIPLES[-1],)

    def train(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        stream = library().trained
        starts = torch.randint(len(stream) - self.length - 1, (rows,), generator=generator)
        tokens = stream[starts[:, None] + torch.arange(self.length + 1)].long()
        return tokens, torch.ones_like(tokens, dtype=torch.bool)

    def test(self, multiple: int, tokens: int) -> tuple[Tensor, Tensor]:
        width = multiple * self.length + 1
        files = [file[:width] for file in library().held_out if len(file) >= width]
        rows = torch.stack(files[: max(8, tokens // width)]).long()
        return rows, torch.ones_like(rows, dtype=torch.bool)


class Library:
    """The tokens of the standard library: `trained`, all files in a row, and `held_out`, a tensor a file."""

    def __init__(self, files: list[Path]) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        texts = [re.sub(" {4}", "\t", file.read_text(encoding="utf-8", errors="ignore")) for file in files]
        self.digest = hashlib.sha256("".join(texts).encode()).hexdigest()[:12]
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(1)).tolist()
        texts = [texts[i] for i in order]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=Code.vocabulary, show_progress=False, initial_alphabet=letters)
        held = len(texts) // 10
        tokenizer.train_from_iterator(texts[held : held + 300], trainer)
        coded = [torch.tensor(one.ids, dtype=torch.int16) for one in tokenizer.encode_batch(texts)]
        self.held_out, self.trained = coded[:held], torch.cat(coded[held:])


@functools.cache
def library() -> Library:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (file for file in root.rglob("*.py") if not {"site-packages", "test", "tests"} & {*file.parts})
    return Library(sorted(file for file in files if 2000 < file.stat().st_size < 200_000))


TASKS = {"ledger": Ledger(), "code": Code()}
