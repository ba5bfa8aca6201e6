"""The claim of the demo: a trained model recalls among 64 times its keys, once it is patched."""

import re

import pytest
import torch

pytest.importorskip("transformers")
from tritonattn.lab.demo import swap


def test_patched_it_extrapolates():
    told = swap.report(torch.device("cpu"))
    found = re.search(r"Among 4,096 pairs it recalls (\d+)% as it was trained, and (\d+)% when it is patched", told)
    assert found, told
    before, after = map(int, found.groups())
    assert before < 35
    assert after > 90
