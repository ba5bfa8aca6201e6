"""Generation by patched models: every mode, cache, search and padding gives the tokens of full passes."""

import copy
import inspect

import pytest
import torch
import transformers
from transformers import DynamicCache

import tritonattn
from tests.huggingface.architectures import ARCHITECTURES, VERSION
from tests.huggingface.checks import padding_changes_nothing, static_cache, stepwise
from tests.support.pairs import in_turn, pairwise
from tritonattn.huggingface import patch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
LLAMA = ARCHITECTURES["llama"]
MODES = [*tritonattn.SCALINGS, "power_law", "ssmax", "learned_cosine", "per_head"]
WINDOWED = ["mistral", "gemma3", "llama4"]


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("mode", MODES)
def test_padding_changes_nothing_in_any_mode(mode):
    padding_changes_nothing(LLAMA, mode)


@in_turn(mode=MODES, cache=["dynamic", "static"])
def test_steps_equal_the_full_pass(mode, cache):
    network, inputs = LLAMA.build(), LLAMA.inputs("left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    with patch(network, scaling=mode), torch.no_grad():
        wanted = network(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).logits
        held = static_cache(network, 20) if cache == "static" else DynamicCache()
        got = stepwise(network, ids, mask, position, cache=held)
    close(got[mask.bool()], wanted[mask.bool()])


def dynamic_cache(network, length: int):
    takes_config = "config" in inspect.signature(DynamicCache.__init__).parameters
    return DynamicCache(config=network.config) if takes_config else DynamicCache()


CACHES = {
    "dynamic": ("llama", dynamic_cache),
    "static": ("llama", static_cache),
    "dynamic window": ("mistral", dynamic_cache),
    "static window": ("mistral", static_cache),
    "static window beside full": ("gemma3", static_cache),
}


@pytest.mark.parametrize("cache", CACHES)
def test_a_long_text_in_pieces_equals_the_full_pass(cache):
    name, make = CACHES[cache]
    network = ARCHITECTURES[name].build()
    ids = torch.randint(3, 61, (2, 64), generator=torch.Generator().manual_seed(0)).repeat(1, 4)
    pieces = [7, 1, 1, 2, 1, 60, 1, 4, *[1] * 10, 30, 1, 1]
    ids = ids[:, : sum(pieces)]
    with patch(network, scaling="key_norm_sum"), torch.no_grad():
        wanted = network(input_ids=ids, use_cache=False).logits
        held = make(network, ids.shape[1])
        got = [network(input_ids=piece, past_key_values=held).logits for piece in ids.split(pieces, dim=1)]
    close(torch.cat(got, dim=1), wanted)


@pytest.mark.parametrize("mode", ["key_norm_mean", "key_norm_max", "cosine", "key_count"])
@pytest.mark.parametrize("name", WINDOWED)
def test_greedy_text_is_that_of_full_passes(name, mode):
    """Sliding and chunked layers forget keys; dynamic and static caches alike."""
    if name == "llama4" and transformers.__version__.startswith("4."):
        return  # its chunks follow the place in the cache
    network, inputs = ARCHITECTURES[name].build(), ARCHITECTURES[name].inputs()
    ids = inputs["input_ids"]
    with patch(network, scaling=mode), torch.no_grad():
        for _ in range(9):
            step = network(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, step], dim=1)
        options = {"max_new_tokens": 9, "do_sample": False}
        assert torch.equal(network.generate(**inputs, **options), ids)
        more = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(network.generate(**inputs, **options, **more), ids)


SEARCHES = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
}


@in_turn(search=[*SEARCHES] * 2, mode=["sqrt_dim", "key_norm_mean", "key_norm_max", "cosine", "key_count"])
def test_searches_are_those_without_a_cache(search, mode):
    network, inputs = LLAMA.build(), LLAMA.inputs("left")
    texts = []
    with patch(network, scaling=mode):
        for cached in (True, False):
            torch.manual_seed(0)
            options = {**SEARCHES[search], "max_new_tokens": 9, "use_cache": cached, "temperature": None}
            texts.append(network.generate(**inputs, **options))
    assert torch.equal(*texts)


@pytest.mark.parametrize("mode", ["sqrt_dim", "key_norm_sum", "key_norm_max"])
@pytest.mark.parametrize("name", ["llama", *(["mistral"] if VERSION >= (5, 24) else [])])  # that rolls windows back
def test_assisted_generation_is_the_greedy_one(name, mode):
    """The assistant's wrong guesses are cropped from the cache."""
    network, inputs = ARCHITECTURES[name].build(), {"input_ids": LLAMA.inputs()["input_ids"][:1]}
    torch.manual_seed(5)
    assistant = copy.deepcopy(network)
    with torch.no_grad():
        for x in assistant.parameters():
            x.add_(0.02 * torch.randn_like(x))
    with patch(network, scaling=mode), patch(assistant, scaling=mode):
        wanted = network.generate(**inputs, max_new_tokens=16, do_sample=False)
        got = network.generate(**inputs, max_new_tokens=16, do_sample=False, assistant_model=assistant)
    assert torch.equal(got, wanted)


@pairwise(name=["bart", "whisper"], mode=["key_norm_mean", "key_norm_max", "cosine"], beams=[1, 3])
def test_encoder_decoders_generate_as_without_a_cache(name, mode, beams):
    architecture = ARCHITECTURES[name]
    network, inputs = architecture.build(), architecture.inputs("left")
    texts = []
    with patch(network, scaling=mode):
        for cached in (True, False):
            options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "use_cache": cached}
            texts.append(network.generate(**inputs, **options))
    assert torch.equal(*texts)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_static_step():
    assert_a_compiled_static_step("llama", "key_count")


def assert_a_compiled_static_step(name: str, mode: str) -> None:
    """fullgraph, left padding, past the window: the greedy text is that without compiling."""
    network, inputs = ARCHITECTURES[name].build(), ARCHITECTURES[name].inputs("left")
    options = {"max_new_tokens": 9, "do_sample": False}
    compiling = transformers.CompileConfig(fullgraph=True, backend="aot_eager", dynamic=None)
    compiling._compile_all_devices = True
    with patch(network, scaling=mode):
        wanted = network.generate(**inputs, **options)
        torch._dynamo.reset()
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        got = network.generate(**inputs, **options, cache_implementation="static", compile_config=compiling)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert torch.equal(got, wanted)
