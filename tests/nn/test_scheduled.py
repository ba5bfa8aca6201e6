"""The steps of a schedule: counted by `advance`, and a warning where no one counts them."""

import copy
import warnings

import pytest
import torch

from tritonattn import attention, nn


def training(*schedules, steps=3, advances=(), compiles=False):
    """Train a weight with schedules for some steps; the messages of warnings."""
    weight = torch.nn.Parameter(torch.ones(8))
    q = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def loss(weight):
        return sum(attention(q * weight, q, q, scaling=one).square().sum() for one in schedules)

    run = torch.compile(loss, backend="eager") if compiles else loss
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            run(weight).backward()
            optimizer.step()
            for one in advances:
                one.advance()
    return [str(warning.message) for warning in caught if "advance" in str(warning.message)]


@pytest.mark.parametrize("compiles", [False, True])
def test_a_schedule_that_no_one_advances_warns_once(compiles):
    scaling = nn.Scheduled("sqrt_dim", "key_norm_mean", steps=10)
    assert training(scaling, steps=1, compiles=compiles) == []
    messages = training(scaling, steps=5, compiles=compiles)
    assert len(messages) == 1
    [message] = messages
    assert message.startswith("advance: expected a call of nn.Scheduled.advance() once an optimiser step, got none")
    assert "call it after optimizer.step()" in message
    assert training(scaling) == []


def test_schedules_that_are_advanced_or_not_trained_say_nothing():
    moving, standing = (nn.Scheduled("sqrt_dim", "key_norm_mean", steps=10) for _ in range(2))
    standing.eval()
    assert training(moving, standing, advances=[moving]) == []
    assert moving.progress().item() == 0.3
    standing.train()
    assert len(training(copy.deepcopy(standing).train(), steps=2, advances=[standing])) == 1, "of the copy"


def test_a_schedule_beside_the_training_of_others_says_nothing():
    """It is alive in train mode, but no call takes its factor."""
    idle = nn.Scheduled("sqrt_dim", "key_norm_mean", steps=10)
    moving = nn.Scheduled("sqrt_dim", "key_norm_mean", steps=10)
    assert training(moving, steps=4, advances=[moving]) == []
    assert idle.progress().item() == 0


def test_an_advance_of_several_steps():
    """As where a loop counts epochs, or goes on from a step of its own."""
    scaling = nn.Scheduled("sqrt_dim", "key_norm_mean", steps=8)
    scaling.advance(3)
    assert scaling.progress().item() == 3 / 8
    scaling.advance(0)
    scaling.advance(5)
    assert scaling.progress().item() == 1
