"""Models of many architectures, patched with sqrt_dim, give the results of their own eager attention."""

import warnings
from itertools import cycle, product

import pytest
import torch

import tritonattn.huggingface
from tests.huggingface.architectures import ARCHITECTURES, PADDINGS
from tests.huggingface.checks import equals_eager
from tests.support.pairs import in_turn

NAMES = [name for name, one in ARCHITECTURES.items() if one.exists and one.supported]
GENERATING = [name for name in NAMES if ARCHITECTURES[name].generates]
REFUSED = [name for name, one in ARCHITECTURES.items() if one.exists and not one.supported]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


# The kinds of masks, in every padding: causal, capped, windows, chunks, sinks, learned positions, cross attention.
KINDS = [
    name for name in ("llama", "gemma2", "gemma3", "mistral", "llama4", "gpt_oss", "gpt2", "bart") if name in NAMES
]


@pytest.mark.parametrize(
    ("name", "padding"),
    dict.fromkeys([*product(KINDS, PADDINGS), *zip(NAMES, cycle(["left", "none", "right", "holes"]), strict=False)]),
)
def test_outputs_and_gradients_equal_eager(name, padding):
    if padding != "none" and not ARCHITECTURES[name].takes_padding:
        return
    equals_eager(ARCHITECTURES[name], padding)


@in_turn(name=GENERATING, padding=["left", "none"])
def test_generation_equals_eager(name, padding):
    architecture = ARCHITECTURES[name]
    network, inputs = architecture.build(), architecture.inputs(padding)
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    wanted = network.generate(**inputs, **options)
    with tritonattn.huggingface.patch(network, scaling="sqrt_dim"):
        assert torch.equal(network.generate(**inputs, **options), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_attention_weights_are_the_models(name):
    """output_attentions=True warns and gives eager attention's weights, never an empty tuple."""
    architecture = ARCHITECTURES[name]
    network, inputs = architecture.build(), architecture.inputs()
    network = getattr(network, "text_model", network) if architecture.kind == "image and text" else network
    inputs.pop("pixel_values" if architecture.kind == "image and text" else "", None)
    kinds = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
    with torch.no_grad():
        wanted = network(**inputs, output_attentions=True)
        with tritonattn.huggingface.patch(network), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            got = network(**inputs, output_attentions=True)
    compared = 0
    assert any("output_attentions" in str(one.message) for one in said) or name == "clip"
    for kind in kinds:
        for mine, its in zip(getattr(got, kind, None) or (), getattr(wanted, kind, None) or (), strict=True):
            torch.testing.assert_close(mine, its, atol=1e-4, rtol=1e-3)
            compared += 1
    asked = any(getattr(wanted, kind, None) for kind in kinds)
    assert compared >= 2 if asked or name != "clip" else compared == 0  # some versions have none of CLIP's


@pytest.mark.parametrize("name", REFUSED or [pytest.param(None, marks=pytest.mark.skip(reason="none in this version"))])
def test_architectures_that_an_older_transformers_lacks_are_refused_by_name(name):
    network = ARCHITECTURES[name].build()
    with pytest.raises(NotImplementedError, match=type(network).__name__):
        tritonattn.huggingface.patch(network)
