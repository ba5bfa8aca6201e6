"""Generation by patched models: every mode, cache, search and padding gives the tokens of full passes."""

import inspect
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

import tritonattn
from tests.huggingface.architectures import ARCHITECTURES
from tests.support.pairs import in_turn
from tritonattn.huggingface import patch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
LLAMA = ARCHITECTURES["llama"]
MODES = [*tritonattn.SCALINGS, "power_law", "ssmax", "learned_cosine", "per_head"]
STATISTICS = ["key_norm_mean", "key_norm_max", "cosine", "key_count"]  # as many ways to look at keys


@pytest.fixture(scope="module")
def llama() -> Any:
    return LLAMA.build()


def dynamic_cache(network: Any, keys: int) -> Any:
    takes_config = "config" in inspect.signature(DynamicCache.__init__).parameters
    return DynamicCache(config=network.config) if takes_config else DynamicCache()


def static_cache(network: Any, keys: int) -> Any:
    more = {"max_batch_size": 2} if transformers.__version__.startswith("4.") else {}
    return transformers.StaticCache(config=network.config, max_cache_len=keys, **more)


CACHES = {"dynamic": dynamic_cache, "static": static_cache}


def in_pieces(network: Any, cache: Any, sizes: list[int], ids: Tensor, mask: Tensor, position: Tensor) -> Tensor:
    """Logits [B, S, V] of passes over pieces of ids [B, S], whose keys the cache holds."""
    logits = []
    for size, end in zip(sizes, accumulate(sizes), strict=True):
        here = slice(end - size, end)
        given = {"input_ids": ids[:, here], "attention_mask": mask[:, :end], "position_ids": position[:, here]}
        logits.append(network(**given, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, dim=1)


def close(got: Tensor, wanted: Tensor) -> None:
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@in_turn(mode=MODES, cache=CACHES)
def test_padding_and_steps_change_nothing(mode, cache, llama):
    """A padded row gives its results alone, and pieces give those of one pass."""
    ids, mask = LLAMA.inputs("left").values()
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    with patch(llama, scaling=mode), torch.no_grad():
        alone = llama(input_ids=ids[:1, mask[0].bool()], use_cache=False).logits
        whole = llama(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).logits
        steps = in_pieces(llama, CACHES[cache](llama, 20), [6, 1, 1, 2, 1, 2], ids, mask, position)
    close(whole[:1, mask[0].bool()], alone)
    close(steps[mask.bool()], whole[mask.bool()])


@pytest.mark.parametrize("holes", [False, True])
def test_distances_over_a_static_cache_are_refused(holes, llama):
    """Its rows do not stand at its last keys, from which kernels would count."""
    ids, mask = LLAMA.inputs("left").values()
    mask[:, 3] = mask[:, 3] * (not holes)
    given = {"input_ids": ids, "attention_mask": mask, "past_key_values": static_cache(llama, 20), "use_cache": True}
    with (
        patch(llama, scaling="scale_invariant"),
        torch.no_grad(),
        pytest.raises(NotImplementedError, match=r"^scaling: "),
    ):
        llama(**given)


@in_turn(name=["mistral", "gemma3", "llama4"] * 2, mode=STATISTICS)
def test_greedy_text_is_that_of_full_passes(name, mode):
    """Sliding and chunked layers forget keys; dynamic and static caches alike, in steps and in longer pieces."""
    if name == "llama4" and transformers.__version__.startswith("4."):
        return  # its chunks follow the position in the cache
    network, inputs = ARCHITECTURES[name].build(), ARCHITECTURES[name].inputs()
    ids = inputs["input_ids"]
    with patch(network, scaling=mode), torch.no_grad():
        for _ in range(7):
            step = network(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, step], dim=1)
        for make in CACHES.values():
            whole = torch.ones_like(ids), torch.arange(20).expand(2, -1)
            got = in_pieces(network, make(network, 20), [7, 1, 1, 6, 1, 2, 2], ids, *whole)
            close(got, network(input_ids=ids, use_cache=False).logits)
        for more in ({}, {"cache_implementation": "static", "disable_compile": True}):
            assert torch.equal(network.generate(**inputs, max_new_tokens=7, do_sample=False, **more), ids)


def assert_the_cache_changes_nothing(network: Any, mode: str, inputs: dict[str, Tensor], **options: Any) -> None:
    texts = []
    with patch(network, scaling=mode):
        for cached in (True, False):
            torch.manual_seed(0)
            texts.append(network.generate(**inputs, **options, use_cache=cached, max_new_tokens=7, temperature=None))
    assert torch.equal(*texts)


SEARCHES = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
}


@in_turn(search=SEARCHES, mode=["sqrt_dim", *STATISTICS])
def test_searches_are_those_without_a_cache(search, mode, llama):
    assert_the_cache_changes_nothing(llama, mode, LLAMA.inputs("left"), **SEARCHES[search])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_static_step():
    assert_a_compiled_static_step("llama", "key_count", layers=1)


def assert_a_compiled_static_step(name: str, mode: str, layers: int = 2) -> None:
    """fullgraph, left padding, past the window: the greedy text is that without compiling."""
    architecture = ARCHITECTURES[name]
    network = replace(architecture, arguments={**architecture.arguments, "num_hidden_layers": layers}).build()
    inputs = architecture.inputs("left")
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


@in_turn(name=["t5", "inkling"] * 2, mode=["key_norm_mean", "log_key_count", "sqrt_dim", "key_norm_mean"])
def test_a_bias_of_pairs_follows_the_cache(name, mode):
    """By a table of distances, and from the hidden state; padding too."""
    if not ARCHITECTURES[name].exists or not ARCHITECTURES[name].supported:
        pytest.skip("a newer transformers has it")
    network, inputs = ARCHITECTURES[name].build(), ARCHITECTURES[name].inputs("right" if name == "t5" else "left")
    inputs.pop("decoder_input_ids", None)
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if "relative" in key or "rel_logits" in key:
                parameter.normal_(0, 3)
    assert_the_cache_changes_nothing(network, mode, inputs, do_sample=False)
