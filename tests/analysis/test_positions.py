"""The loss by position: of models that know where they fail, and its picture."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from tests.support.refusals import refuses
from tritonattn import analysis
from tritonattn.analysis import RULES, loss_by_position, plot_loss_by_position
from tritonattn.analysis import rules as sources

TOKENS = torch.arange(24).expand(3, -1) % 7
SURE = math.log(1 + 6 * math.exp(-9))


def sure_of(given):
    """Logits of the right token at positions up to 5, and of a wrong one from there on."""
    right = torch.where(torch.arange(given.shape[1]) < 5, (given + 1) % 7, given)
    return 9.0 * one_hot(right, 7).float()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.9)

    def forward(self, given):
        return SimpleNamespace(logits=self.dropout(sure_of(given)))


@pytest.mark.parametrize("model", [sure_of, Model()])
def test_losses_are_told_apart_by_position(model):
    """Up to the trained length, then by stretches of twice the end; a model of transformers has logits, and dropout."""
    wrong = SURE + 9
    expected = {"0-5": SURE, "5-10": wrong, "10-20": wrong, "20-23": wrong}
    assert loss_by_position(model, TOKENS, 5) == pytest.approx(expected, abs=1e-5)
    assert list(loss_by_position(model, TOKENS, 23)) == ["0-23"]


def test_refusals():
    for error, arguments in {
        "TypeError: tokens: expected a tensor of ids, got torch.float32": (sure_of, torch.rand(2, 5), 4),
        "TypeError: tokens: expected a tensor of ids, got list": (sure_of, [[1, 2]], 4),
        "ValueError: tokens: expected [B, S] with S at least 2, got [2, 1]": (sure_of, TOKENS[:2, :1], 4),
        "ValueError: trained_length: expected at least 1, got 0": (sure_of, TOKENS, 0),
        "ValueError: model: expected logits [3, 23, V] of tokens[:, :-1], got [3, 23]": (lambda x: x, TOKENS, 4),
    }.items():
        refuses(error, loss_by_position, *arguments)


def test_the_picture_has_every_name_and_the_trained_length(tmp_path):
    pytest.importorskip("matplotlib")
    losses = {"sqrt_dim": loss_by_position(sure_of, TOKENS, 5), "of all": loss_by_position(sure_of, TOKENS, 23)}
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_loss_by_position(losses, tmp_path / "losses.svg")
    drawn = (tmp_path / "losses.svg").read_text()
    assert all(word in drawn for word in ("sqrt_dim", "of all", "position", "loss, nats a token"))
    refuses("ValueError: losses: expected results of loss_by_position by name", plot_loss_by_position, {}, "a.png")


def test_what_advise_says_to_watch_is_in_the_package():
    watched = [rule.watch for rule in RULES if "loss_by_position" in rule.watch]
    assert len(watched) >= 3
    for watch in [*watched, sources.POSITIONS_FIRST.watch]:
        assert "docs/recipes.md" not in watch
        name = watch.split("tritonattn.analysis.")[1].split()[0]
        assert callable(getattr(analysis, name))
