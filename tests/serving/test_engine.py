"""vLLM's engine on the backend TRITONATTN, against patched models of transformers."""

import gc
import math
from collections import Counter

import pytest
import torch
from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory

from tritonattn.integrations.vllm import backend

from .cases import STEPS, TOLERANCE, Case, difference, generate, learned, prompts

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
CASES = {
    "log_key_count": Case("llama", "log_key_count"),
    "key_norm_mean": Case("llama", "key_norm_mean"),
    "window": Case("mistral", "key_norm_mean"),
    "softcap": Case("gemma2", "log_key_count"),
    # Last: numba, which guesses, holds an object on which vLLM's next engine would fail (triton_utils/dispatcher.py).
    "learned": Case("llama", learned, {"speculative_config": NGRAM}),
}


@pytest.fixture(scope="module", params=CASES)
def served(request, tmp_path_factory):
    """An engine, and the patched and the plain model."""
    patched, plain, arguments = CASES[request.param].make(tmp_path_factory.mktemp(request.param))
    llm = LLM(**arguments)
    yield llm, patched, plain
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.fixture
def paths(monkeypatch) -> Counter:
    """How often the engine called each function: with rows of a first chunk, of a later one, and of guessed tokens."""
    seen, decode, varlen = Counter(), backend.attention_decode, backend.attention_varlen

    def counted_decode(*args, block_table, **options):
        seen["decode"] += 1
        return decode(*args, block_table=block_table, **options)

    def counted_varlen(q, k, v, row_ends, key_ends, *args, block_table, **options):
        rows, keys = row_ends.diff(), key_ends.diff()
        seen["chunk"] += 1
        seen["later chunk"] += int((rows < keys).any())
        seen["guesses"] += int(((rows < keys) & (rows <= 4)).any())
        return varlen(q, k, v, row_ends, key_ends, *args, block_table=block_table, **options)

    monkeypatch.setattr(backend, "attention_decode", counted_decode)
    monkeypatch.setattr(backend, "attention_varlen", counted_varlen)
    return seen


def test_tokens_and_logits_are_those_of_patched_transformers(served, paths):
    llm, patched, plain = served
    outputs = generate(llm, prompts())  # some begin with pages that others write in the same step
    assert outputs[5].num_cached_tokens >= 64
    wrong, largest = difference(patched, outputs)
    assert (wrong, largest < TOLERANCE) == (0, True), largest
    outputs = generate(llm, prompts(), prompt_logprobs=-1)  # reads no cached prefix
    assert sum(len(x.outputs[0].token_ids) for x in outputs) == 7 * STEPS
    wrong, largest = difference(patched, outputs)
    assert (wrong, largest < TOLERANCE) == (0, True), largest
    again = generate(llm, [prompts()[i] for i in (5, 3)])
    assert all(x.num_cached_tokens >= 48 for x in again)
    wrong, largest = difference(patched, again)
    assert (wrong, largest < TOLERANCE) == (0, True), largest
    differing, largest = difference(plain, outputs)
    assert differing > STEPS
    assert largest > 50 * TOLERANCE
    assert paths["decode"] > 0
    assert paths["later chunk"] > 0
    if llm.llm_engine.vllm_config.speculative_config is not None:
        assert paths["guesses"] > 0


def _longest(real, q, *args, key_lengths, scaling, gain, **options):
    """Every row counts the keys of the longest sequence."""
    return real(q, *args, key_lengths=key_lengths, scaling="sqrt_dim", gain=math.log(key_lengths.max()), **options)


def _one_less(real, q, *args, key_lengths, scaling, gain, **options):
    """Every row counts one key less."""
    n = (key_lengths - 1).clamp(min=1).float().log()[:, None, None]
    return real(q, *args, key_lengths=key_lengths, scaling="sqrt_dim", gain=n, **options)


def _of_chunk(real, q, k, v, row_ends, *args, scaling, gain, **options):
    """Rows count keys from the start of the chunk."""
    n = torch.cat([torch.arange(1, int(rows) + 1) for rows in row_ends.diff()]).float().log()[None]
    return real(q, k, v, row_ends, *args, scaling="sqrt_dim", gain=n, **options)


def _only_new(real, q, k, v, row_ends, key_ends, *args, **options):
    """Rows see the first keys of their sequence, as many as the chunk has."""
    return real(q, k, v, row_ends, row_ends, *args, **options)


FAULTS = {
    "n of the longest sequence": ("attention_decode", _longest),
    "n - 1": ("attention_decode", _one_less),
    "n of the chunk": ("attention_varlen", _of_chunk),
    "old keys of a chunk are left out": ("attention_varlen", _only_new),
}


@pytest.mark.parametrize("served", ["log_key_count"], indirect=True)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(served, monkeypatch, fault):
    llm, patched, _ = served
    name, wrong = FAULTS[fault]
    real = getattr(backend, name)
    monkeypatch.setattr(backend, name, lambda *args, **options: wrong(real, *args, **options))
    llm.reset_prefix_cache()
    outputs = generate(llm, prompts(), prompt_logprobs=-1)
    llm.reset_prefix_cache()
    assert difference(patched, outputs)[1] > TOLERANCE
