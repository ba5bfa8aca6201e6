"""The presets against the code of their models."""

import math

import pytest
import torch

from tritonattn.core.statistics import Statistics
from tritonattn.core.visibility import Visibility
from tritonattn.scaling import Llama4, Ministral3, QwenLogn

D = 16


def temperatures(scaling, rows):
    """The factor of every row of a causal square, without 1 / sqrt(D)."""
    q = torch.empty(1, 1, rows, D)
    visibility = Visibility.of(q, q, causal=True)
    scales = scaling.scales(q, q, visibility, Statistics(q, visibility))
    assert scales.constant == D**-0.5
    return scales.query.flatten()


@pytest.mark.parametrize("length", [7, 64])
def test_qwen(length):
    """QWenAttention.logn_tensor: math.log(i, seq_length) if i > seq_length else 1, i from 1."""
    model = [math.log(i, length) if i > length else 1 for i in range(1, 200)]
    assert temperatures(QwenLogn(train_length=length), 199).tolist() == pytest.approx(model, rel=1e-12)


def test_llama4():
    positions = torch.arange(200)
    model = torch.log1p(torch.floor((positions.double() + 1.0) / 16)) * 0.3 + 1.0
    torch.testing.assert_close(temperatures(Llama4(scale=0.3, floor_scale=16), 200), model, rtol=1e-12, atol=0)


def test_ministral3_is_its_models_function():
    modeling = pytest.importorskip("transformers.models.ministral3.modeling_ministral3")
    model = modeling.get_llama_4_attn_scale(torch.arange(200)[None], 0.2, 16).flatten()
    ours = temperatures(Ministral3(beta=0.2, original_length=16), 200)
    torch.testing.assert_close(ours.float(), model)


def test_defaults_leave_short_sequences_alone():
    for scaling in (QwenLogn(), Llama4(), Ministral3()):
        assert (temperatures(scaling, 8191) == 1).all()
    rows = 16385
    assert temperatures(QwenLogn(), rows)[8191:8193].tolist() == pytest.approx([1, math.log(8193) / math.log(8192)])
    assert temperatures(Llama4(), rows)[8190:8192].tolist() == pytest.approx([1, 1 + 0.1 * math.log(2)])
    assert temperatures(Ministral3(), rows)[16383:].tolist() == pytest.approx([1, 1 + 0.1 * math.log(2)])


BAD = [(QwenLogn, "train_length", 1, "1"), (QwenLogn, "train_length", math.nan, "1"), (Llama4, "scale", 0.0, "0")]
BAD += [(Llama4, "floor_scale", -8192, "0"), (Llama4, "floor_scale", None, "0"), (Ministral3, "beta", math.inf, "0")]


@pytest.mark.parametrize(("mode", "argument", "value", "bound"), [*BAD, (Ministral3, "original_length", "16384", "0")])
def test_bad_parameters_are_refused(mode, argument, value, bound):
    with pytest.raises(ValueError, match=rf"^{argument}: expected a finite number above {bound}, got {value!r}"):
        mode(**{argument: value})
