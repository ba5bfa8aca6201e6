"""Names of modes, with a base or without: one reader of them, wherever a scaling is taken."""

import math
import typing
import warnings

import numpy as np
import pytest
import torch

import tritonattn
from tests.support.refusals import refuses
from tritonattn import SCALINGS, attention, nn
from tritonattn.core.hints import warn_once
from tritonattn.integrations.torch_modules import MultiheadAttention
from tritonattn.scaling import LogKeyCount, LogPower, QwenLogn, SqrtDim
from tritonattn.scaling.names import LearnedName, ModeName, named_scaling

Q = torch.randn(1, 2, 20, 8, generator=torch.Generator().manual_seed(0))
TEXTS = {
    "log_key_count:64": LogKeyCount(64),
    "log_key_count(64)": LogKeyCount(64),  # as `Advice.mode` has it
    "log_key_count(2.5)": LogKeyCount(2.5),
    "log_power:64": LogPower(base=64),
    "log_power(2, 64)": LogPower(2, 64),
    "qwen_logn:7": QwenLogn(7),
}


def compiled(text):
    function = torch.compile(lambda q: attention(q, q, q, causal=True, scaling=text), backend="eager", fullgraph=True)
    assert torch.equal(function(Q), attention(Q, Q, Q, causal=True, scaling=TEXTS[text]))
    return TEXTS[text]


PLACES = {
    "call": named_scaling,
    "compiled call": compiled,
    "layer": lambda text: nn.ScaledAttention(16, 2, scaling=text).scaling,
    "mode in a module": lambda text: nn.PerHead(text, heads=2).mode,
    "schedule": lambda text: nn.Scheduled("dim", text, steps=2).mode_b,
    "torch's layer": lambda text: MultiheadAttention(16, 2, scaling=text).scaling,
}


@pytest.mark.parametrize(
    ("text", "place"),
    [(text, place) for text in TEXTS for place in PLACES if place != "compiled call" or text == "log_power(2, 64)"],
)
def test_a_text_is_the_same_mode_everywhere(text, place):
    assert PLACES[place](text) == TEXTS[text]
    assert torch.equal(attention(Q, Q, Q, scaling=text), attention(Q, Q, Q, scaling=TEXTS[text]))


@pytest.mark.parametrize("name", [name for name in nn.LEARNED if name != "learned_cosine"])
def test_a_learned_mode_by_name_starts_at_sqrt_dim(name):
    made = nn.ScaledAttention(16, 2, scaling=name).scaling
    torch.testing.assert_close(attention(Q, Q, Q, scaling=made), attention(Q, Q, Q, scaling=SqrtDim()))
    assert isinstance(made, nn.LEARNED[name])


def test_a_learned_mode_with_a_base_starts_there():
    for name, like in (("ssmax", LogKeyCount(64)), ("learned_log_power", LogPower(base=64))):
        made = nn.ScaledAttention(16, 2, scaling=f"{name}:64").scaling
        torch.testing.assert_close(attention(Q, Q, Q, scaling=made), attention(Q, Q, Q, scaling=like))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dim:3", "expected a name, or one of log_key_count:LENGTH, ~ LENGTH a number of tokens, got 'dim:3'"),
        ("log_key_count:", "got 'log_key_count:'"),
        ("log_key_count:-64", "got 'log_key_count:-64'"),
        ("log_key_count:1_0", "got 'log_key_count:1_0'"),
        ("log_key_count:64:2", "got 'log_key_count:64:2'"),
        ("log_power(2, 64, 3)", "got 'log_power(2, 64, 3)'"),
        ("cosine()", "got 'cosine()'"),
        ("log_key_count)", "got 'log_key_count)'"),
        ("ssmax:64", "which is a module ~ tritonattn.nn.SSMax(heads=Hq, base=LENGTH)"),
    ],
)
def test_other_texts_are_refused(text, message):
    refuses(f"ValueError: scaling: ~ {message}", attention, Q, Q, Q, scaling=text)
    refuses("ValueError: base: expected a finite number above 1, got 1", attention, Q, Q, Q, scaling="log_key_count:1")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("logn", "log_key_count"),
        ("log-n", "log_key_count"),
        ("qwen", "qwen_logn"),
        ("ssmx", "ssmax"),
        ("SSMax", "ssmax"),
        ("scalable softmax", "ssmax"),
        ("LogKeyCount", "log_key_count"),
        ("cosin", "cosine"),
    ],
)
def test_a_name_of_no_mode_suggests_one(name, near):
    refuses(f"ValueError: scaling: ~ got {name!r} (did you mean {near!r}?)", attention, Q, Q, Q, scaling=name)
    refuses(f"ValueError: scaling: ~ (did you mean {near!r}?)", nn.ScaledAttention, 16, 2, scaling=name)
    refuses(f"KeyError: ~ (did you mean {near!r}?)", lambda: SCALINGS[name])


def test_a_class_put_in_the_place_of_another_is_taken(monkeypatch):
    """Modes of the package are made once; a user's anew in each call."""

    class Ours(SCALINGS["log_key_count"]):
        pass

    first = named_scaling("log_key_count:64")
    assert named_scaling("log_key_count:64") is first
    monkeypatch.setitem(SCALINGS, "log_key_count", Ours)
    ours = [named_scaling("log_key_count:64") for _ in range(2)]
    assert [type(one) for one in ours] == [Ours, Ours]
    assert ours[0] is not ours[1]
    monkeypatch.undo()
    assert named_scaling("log_key_count:64") == first


@pytest.mark.parametrize(
    "make",
    [
        lambda: named_scaling("log_key_count"),
        lambda **base: SCALINGS["log_key_count"](**base),
        lambda **base: SCALINGS["log_power"](**base),
        lambda **base: nn.SSMax(4, **base),
        lambda **base: nn.SSMax(4, bias=True, **base),
        lambda **base: nn.LearnedLogPower(4, **base),
    ],
)
def test_a_base_that_was_forgotten_is_named_once(make):
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="expected a base") as found:
        made = make()
    name, (warning,) = made.name, found
    assert str(warning.message).startswith(f"{name}: expected a base, ")
    assert f'write "{name}:64", or base=64' in str(warning.message)
    assert warning.filename == __file__
    assert made.base == math.e
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make()
        warn_once.cache_clear()
        for given in (math.e, 64):
            type(made)(**({"heads": 4} if isinstance(made, torch.nn.Module) else {}), base=given)
        nn.SSMax(4, mode="sqrt_dim")
        nn.LearnedLogPower(4, mode="sqrt_dim")


def test_the_names_of_the_types_are_those_of_the_modes():
    assert typing.get_args(ModeName) == tuple(SCALINGS)
    assert typing.get_args(LearnedName) == tuple(nn.LEARNED)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float16(0.5), np.float64(0.5)])
def test_a_number_of_numpy_is_a_number(number):
    q = Q.double()
    for backend in ("sdpa", "reference"):
        for word in ("scaling", "gain", "softcap"):
            found, wanted = (attention(q, q, q, backend=backend, **{word: x}) for x in (number, 0.5))
            assert torch.equal(found, wanted)
    scaled = tritonattn.scaled_attention
    assert torch.equal(scaled(q, q, q, scale=number), scaled(q, q, q, scale=0.5))
    refuses("TypeError: scaling: expected a name, ~ got bool", attention, q, q, q, scaling=np.bool_(True))
