"""vLLM's engine on the backend TRITONATTN, against patched models of transformers."""

import gc
from collections import Counter

import pytest
from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory

from tritonattn.integrations.serving.layers import ServedLayer

from .cases import STEPS, TOLERANCE, Case, difference, gains, generate, learned, prompts

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
CASES = {
    "log_key_count": Case("llama", "log_key_count"),
    "key_norm_mean": Case("llama", "key_norm_mean"),
    "window": Case("mistral", "key_norm_mean"),
    "softcap": Case("gemma2", "log_key_count"),
    "head dim 512": Case("gemma4", learned, {"attention_backend": "TRITONATTN", "num_gpu_blocks_override": 512}),
    "gains": Case("llama", gains, {"block_size": 32, "num_gpu_blocks_override": 48}),
    # Last: numba, which guesses, holds an object on which vLLM's next engine would fail (triton_utils/dispatcher.py).
    "learned": Case("llama", learned, {"speculative_config": NGRAM}),
}


@pytest.fixture(scope="module", params=CASES)
def served(request, tmp_path_factory):
    """An engine, the patched and the plain model."""
    case = CASES[request.param]
    patched, plain, arguments = case.make(tmp_path_factory.mktemp(request.param))
    llm = LLM(**arguments)
    yield llm, patched, plain
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.fixture
def paths(monkeypatch) -> Counter:
    """Calls of each function by the engine: with rows of a first chunk, of a later one, and of guessed tokens."""
    calls, out = Counter(), ServedLayer._out

    def counted(self, call):
        sequences = call.visibility.sequences
        if sequences is None:
            calls["decode"] += 1
        else:
            rows, keys = sequences.q_starts.diff(), sequences.k_starts.diff()
            calls["chunk"] += 1
            calls["later chunk"] += int((rows < keys).any())
            calls["guesses"] += int(((rows < keys) & (rows <= 4)).any())
        return out(self, call)

    monkeypatch.setattr(ServedLayer, "_out", counted)
    return calls


def test_tokens_and_logits_are_those_of_patched_transformers(served, paths):
    llm, patched, plain = served
    outputs = generate(llm, prompts())  # some begin with pages that others write in the same step
    assert outputs[5].num_cached_tokens >= 64
    uncached = generate(llm, prompts(), prompt_logprobs=-1)  # reads no cached prefix
    assert sum(len(x.outputs[0].token_ids) for x in uncached) == 7 * STEPS
    again = generate(llm, [prompts()[i] for i in (5, 3)])
    assert again[0].num_cached_tokens >= 48
    for found in (outputs, uncached, again):
        wrong, largest = difference(patched, found)
        assert (wrong, largest < TOLERANCE) == (0, True), largest
    differing, largest = difference(plain, uncached)
    assert differing > STEPS
    assert largest > 50 * TOLERANCE
    assert paths["decode"] > 0
    assert paths["later chunk"] > 0
    if llm.llm_engine.vllm_config.speculative_config is not None:
        assert paths["guesses"] > 0
