"""Models of many architectures give, patched with sqrt_dim, what they give with their own eager attention."""

from __future__ import annotations

import pytest
import torch

import tritonattn.huggingface
from tests.huggingface.architectures import ARCHITECTURES, PADDINGS

NAMES = [name for name, one in ARCHITECTURES.items() if one.exists and one.supported]
REFUSED = [name for name, one in ARCHITECTURES.items() if one.exists and not one.supported]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def gradients(network, architecture, inputs) -> dict[str, torch.Tensor]:
    network.zero_grad()
    out = architecture.outputs(network, inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weight).mean().backward()
    return {name: x.grad.clone() for name, x in network.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_equal_eager(name):
    architecture = ARCHITECTURES[name]
    network = architecture.build()
    for padding in PADDINGS if architecture.takes_padding else ["none"]:
        inputs = architecture.inputs(padding)
        with torch.no_grad():
            wanted = architecture.outputs(network, inputs)
        expected = gradients(network, architecture, inputs)
        with tritonattn.huggingface.patch(network, scaling="sqrt_dim"):
            with torch.no_grad():
                got = architecture.outputs(network, inputs)
            found = gradients(network, architecture, inputs)
        assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max(), padding
        assert found.keys() == expected.keys()
        largest = max(x.norm() for x in expected.values())
        for parameter, gradient in expected.items():
            error = (found[parameter] - gradient).norm()
            assert error <= 1e-3 * gradient.norm() + 1e-6 * largest, (padding, parameter, error, gradient.norm())


@pytest.mark.parametrize("name", [name for name in NAMES if ARCHITECTURES[name].generates])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_generation_equals_eager(name, padding):
    architecture = ARCHITECTURES[name]
    if padding == "left" and architecture.kind == "speech":
        padding = "none"
    network, inputs = architecture.build(), architecture.inputs(padding)
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    wanted = network.generate(**inputs, **options)
    with tritonattn.huggingface.patch(network, scaling="sqrt_dim"):
        assert torch.equal(network.generate(**inputs, **options), wanted)


@pytest.mark.parametrize("name", REFUSED or [pytest.param(None, marks=pytest.mark.skip(reason="none in this version"))])
def test_what_an_older_transformers_cannot_do_is_refused_by_name(name):
    network = ARCHITECTURES[name].build()
    with pytest.raises(NotImplementedError, match=type(network).__name__):
        tritonattn.huggingface.patch(network)
