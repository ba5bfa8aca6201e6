"""Models of many architectures, patched with sqrt_dim, give the results of their eager attention."""

import warnings
from itertools import cycle
from typing import Any

import pytest
import torch

from tests.huggingface.architectures import ARCHITECTURES, Architecture
from tests.huggingface.test_patch import state
from tritonattn.huggingface import patch, patched

NAMES = [name for name, one in ARCHITECTURES.items() if one.exists and one.supported]
PADDING = dict(zip(ARCHITECTURES, cycle(["left", "right", "none", "holes"]), strict=False))
IMPLEMENTATION = dict(zip(ARCHITECTURES, cycle(["eager", "sdpa"]), strict=False))
WEIGHTS = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module", params=NAMES)
def subject(request) -> tuple[str, Architecture, Any]:
    architecture = ARCHITECTURES[request.param]
    return request.param, architecture, architecture.build()


def test_outputs_and_gradients_equal_eager(subject):
    name, architecture, network = subject
    inputs = architecture.inputs(PADDING[name] if architecture.takes_padding else "none")

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The outputs, and every parameter's gradient of a random projection of them."""
        network.zero_grad()
        out = architecture.outputs(network, inputs)
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).mean().backward()
        return out.detach(), {name: x.grad.clone() for name, x in network.named_parameters() if x.grad is not None}

    wanted, expected = run()
    with patch(network, scaling="sqrt_dim"):
        got, found = run()
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert found.keys() == expected.keys()
    largest = max(x.norm() for x in expected.values())
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm()
        assert error <= 1e-3 * gradient.norm() + 1e-6 * largest, (name, float(error), float(gradient.norm()))


def test_attention_weights_are_the_models(subject):
    """output_attentions=True warns and gives eager attention's weights, never an empty tuple."""
    name, architecture, network = subject
    inputs = architecture.inputs()
    if name == "clip":
        network = network.text_model
        del inputs["pixel_values"]
    with torch.no_grad():
        wanted = network(**inputs, output_attentions=True)
        with patch(network), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            got = network(**inputs, output_attentions=True)
    asked = {field: weights for field in WEIGHTS if (weights := getattr(wanted, field, None))}
    assert asked or name == "clip"  # some versions have none of CLIP's
    assert name == "clip" or any("output_attentions" in str(one.message) for one in said)
    for field, weights in asked.items():
        assert len(weights) == 2, field
        torch.testing.assert_close(getattr(got, field), weights, atol=1e-4, rtol=1e-3)


def test_undo_is_bit_identical(subject):
    name, architecture, network = subject
    inputs = architecture.inputs()
    network.set_attn_implementation(IMPLEMENTATION[name] if network._supports_sdpa else "eager")
    with torch.no_grad():
        wanted, before = architecture.outputs(network, inputs), state(network)
        with patch(network, scaling="ssmax", gain=torch.full((4, 1), 1.5)) as one:
            assert not torch.equal(architecture.outputs(network, inputs), wanted)
            assert patched(network) is one
        assert patched(network) is None
        assert torch.equal(architecture.outputs(network, inputs), wanted)
    assert state(network) == before
    one.undo()
