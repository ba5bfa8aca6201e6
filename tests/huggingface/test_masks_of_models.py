"""The masks that models make for their layers and caches are ranges, equal to transformers' own, and small."""

import inspect

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from tests.huggingface.architectures import ARCHITECTURES
from tests.support.pairs import in_turn, pairwise
from tritonattn.huggingface import attention_forward, key_range_mask, patch, register

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Spy:
    """A mask function that compares every mask with transformers' dense one, and keeps its dtype."""

    def __init__(self) -> None:
        self.dtypes: list[torch.dtype | None] = []

    def __call__(self, **asked):
        mask = key_range_mask(**asked)
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        wanted = masking_utils.sdpa_mask(**{**asked, **skips})
        self.dtypes.append(None if mask is None else mask.dtype)
        if mask is None:
            mask = key_range_mask(**{**asked, **skips})
        if mask.dtype == torch.int32:
            key = torch.arange(asked["kv_length"])
            mask = (key >= mask[..., :1]) & (key < mask[..., 1:])
        assert torch.equal(mask.expand_as(wanted), wanted)
        return key_range_mask(**asked)


@pytest.fixture
def spy():
    one = Spy()
    register("tritonattn", attention_forward, one)
    yield one
    register()


NAMES = [name for name, one in ARCHITECTURES.items() if one.exists and one.takes_padding and not one.makes_own_masks]
CACHED = [name for name in ("llama", "mistral", "gemma3", "llama4", "phi3", "gpt_oss") if ARCHITECTURES[name].exists]


@in_turn(name=[*NAMES, *CACHED * 4], padding=["none", "left", "right", "holes", "left"])
def test_masks_of_a_forward_pass(name, padding, spy):
    architecture = ARCHITECTURES[name]
    network = architecture.build()
    with patch(network), torch.no_grad():
        architecture.outputs(network, architecture.inputs(padding))
    # BART's decoder is not padded: no mask, or one that is stated.
    unpadded = torch.int32 if name == "nllb_moe" else None
    assert set(spy.dtypes) <= ({torch.bool, unpadded} if padding == "holes" else {torch.int32, unpadded})
    assert padding == "none" or spy.dtypes[0] is not None


@pairwise(name=CACHED, padding=["none", "left"], cache=["dynamic", "static"])
def test_masks_of_caches(name, padding, cache, spy):
    """Full, sliding and chunked layers of dynamic and static caches, past the end of the window."""
    network, inputs = ARCHITECTURES[name].build(), ARCHITECTURES[name].inputs(padding)
    options = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    with patch(network):
        network.generate(**inputs, max_new_tokens=9, do_sample=False, **options)
    assert len(spy.dtypes) > 1
    assert set(spy.dtypes) <= {torch.int32, None}


class Largest(TorchDispatchMode):
    """The most elements that any tensor made in this context has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


LONG = 65536


def long_model(**changes):
    arguments = {
        **ARCHITECTURES["mistral"].arguments,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": LONG,
        **changes,
    }
    return transformers.MistralModel(transformers.MistralConfig(**arguments)).eval()


@pytest.mark.parametrize("kind", ["causal", "window", "chunk", "padded", "packed"])
def test_masks_at_64k_are_small(kind):
    """No tensor of Q x K is made: none has more than 8 elements a token."""
    network = long_model(sliding_window=4096)
    config = network.config
    config._attn_implementation = "tritonattn"
    config.attention_chunk_size = 8192
    makers = {
        "window": masking_utils.create_sliding_window_causal_mask,
        "chunk": masking_utils.create_chunked_causal_mask,
    }
    embeddings = torch.zeros(1, LONG, 1)
    seen, position = None, torch.arange(LONG)[None]
    if kind == "padded":
        seen = torch.ones(1, LONG, dtype=torch.int64)
        seen[:, :100] = 0
    if kind == "packed":
        position = position % 10_000
    asked = {"config": config, "attention_mask": seen, "position_ids": position}
    create = makers.get(kind, masking_utils.create_causal_mask)
    parameters = inspect.signature(create).parameters
    asked["inputs_embeds" if "inputs_embeds" in parameters else "input_embeds"] = embeddings
    asked["past_key_values" if "past_key_values" in parameters else "cache"] = None
    if "cache_position" in parameters:
        asked["cache_position"] = torch.arange(LONG)
    with Largest() as largest:
        mask = create(**asked)
    assert mask.shape == (1, 1, LONG, 2) if kind != "causal" else mask is None or mask.shape[-1] == 2
    assert largest.elements <= 8 * LONG


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "llama4"])
def test_masks_of_packed_documents(name, spy):
    network, ids = ARCHITECTURES[name].build(), ARCHITECTURES[name].inputs()["input_ids"][:1]
    position = torch.tensor([[*range(6), *range(7)]])
    with patch(network), torch.no_grad():
        packed = network(input_ids=ids, position_ids=position, use_cache=False).logits
        assert set(spy.dtypes) == {torch.int32}
        parts = [network(input_ids=part, use_cache=False).logits for part in ids.split([6, 7], dim=1)]
    if name in ("llama", "mistral", "gemma3"):  # Llama 4's chunks and temperatures follow the place in the batch
        torch.testing.assert_close(packed, torch.cat(parts, dim=1), atol=1e-3, rtol=1e-3)
