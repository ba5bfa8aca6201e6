"""docs/examples/passkey.py, whose real size needs a GPU: its windows, and what it counts as recalled."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).resolve().parents[2] / "docs/examples/passkey.py"


@pytest.fixture
def passkey(monkeypatch):
    spec = spec_from_file_location("passkey", FILE)
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "passkey", module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_a_reader_of_the_hidden_passkeys_recalls_all_and_one_of_a_wrong_digit_none(passkey):
    size, cpu = passkey.SIZES["tiny"], torch.device("cpu")
    data = torch.arange(5000).remainder(size.text).to(torch.uint16)

    def reader(tokens, last, wrong=0):
        """Say after each asked name the digits that follow it where it is hidden, the last one changed by `wrong`."""
        first_digit, first_name = size.text + 2, size.text + 12
        logits = torch.zeros(1, tokens.shape[1], first_name + passkey.NAMES)
        row = tokens[0].tolist()
        hidden = {row[i + 1]: row[i + 2 : i + 2 + passkey.DIGITS] for i, x in enumerate(row) if x == size.text}
        assert len(hidden) == passkey.PASSKEYS
        for i in (i for i, x in enumerate(row) if x == size.text + 1):
            for position, digit in enumerate(hidden[row[i + 1]]):
                turned = (digit - first_digit + wrong * (position == passkey.DIGITS - 1)) % 10
                logits[0, i + 1 + position, first_digit + turned] = 1.0
        return logits[:, -last:]

    for length in (size.length, 8 * size.length):
        assert passkey.recalled(reader, size, length, data, cpu, tests=3) == 1.0
    off = passkey.recalled(lambda tokens, last: reader(tokens, last, wrong=1), size, size.length, None, cpu, tests=3)
    assert off == 0.0
