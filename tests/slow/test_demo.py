"""The claim of the demo: a trained model recalls among 64 times its keys, once it is patched."""

import re

import pytest
import torch

pytest.importorskip("transformers")
from tritonattn.lab.demo import swap


def test_patched_it_extrapolates():
    told = swap.report(torch.device("cpu"))
    lasts = re.findall(r"(?:as trained|patched).* (\S+)%$", told, re.MULTILINE)
    before, after, free_before, free_after = map(float, lasts)
    assert before < 35
    assert after > 90
    assert abs(free_after - free_before) < 15  # without QK-norm
