"""Optimizers that step a layer without the parameters that a patch has added to it."""

import warnings

import pytest
import torch
from torch import nn

from tritonattn.core.optimizers import _awaited
from tritonattn.integrations.torch_modules import replace_multihead_attention
from tritonattn.nn import scaling_parameters

LEFT_OUT = "optimizer: expected the parameters that a patch has added to attention layers, got a SGD of those before"


def model():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 2, enable_nested_tensor=False)


def sgd(*modules):
    return torch.optim.SGD([x for module in modules for x in module.parameters()], lr=0.1)


def steps(*optimizers, rounds=3):
    """The warnings of some rounds of steps."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(rounds):
            for optimizer in optimizers:
                optimizer.step()
    return [str(one.message) for one in said if "optimizer" in str(one.message)]


@pytest.fixture(autouse=True)
def _nothing_is_awaited():
    _awaited.clear()


def test_an_optimizer_from_before_is_told_once():
    network = model()
    before = sgd(network)
    replaced = replace_multihead_attention(network, "ssmax")
    (said,) = steps(before)
    assert said.startswith(LEFT_OUT)
    assert _awaited == []
    replaced.undo()


@pytest.mark.parametrize("case", ["after", "added", "two", "frozen", "undone", "another model", "plain"])
def test_others_are_not(case):
    network = model()
    optimizers = [sgd(model() if case == "another model" else network)]
    replaced = replace_multihead_attention(network, "dim" if case == "plain" else "ssmax")
    learned = list(scaling_parameters(network))
    if case == "after":
        optimizers = [sgd(network)]
    elif case == "added":
        optimizers[0].add_param_group({"params": learned})
    elif case == "two":
        optimizers += [torch.optim.SGD(learned, lr=0.1)]
    elif case == "frozen":
        for x in learned:
            x.requires_grad_(False)
    elif case == "undone":
        replaced.undo()
    assert steps(*optimizers) == []
    assert len(_awaited) == (case == "another model")
