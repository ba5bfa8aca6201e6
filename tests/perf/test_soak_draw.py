"""Calls that the soak draws: the same for the same seed, every form sooner or later, the known hazard first."""

import pytest
import torch

pytest.importorskip("triton")
from perf.soak_draw import HAZARD_SEEDS, INTERPRETED, draw
from tritonattn import SCALINGS

CPU = torch.device("cpu")


def test_a_seed_is_a_call():
    for seed in (0, 200, 201, 202):
        first, second = (draw(seed, CPU, INTERPRETED) for _ in range(2))
        assert str(first) == str(second)
        for name, tensor in first.leaves.items():
            torch.testing.assert_close(second.leaves[name], tensor, rtol=0, atol=0, equal_nan=True)
            assert second.leaves[name].stride() == tensor.stride()


def test_every_form_is_drawn():
    drawn = [draw(HAZARD_SEEDS + seed, CPU, INTERPRETED) for seed in range(500)]
    assert {trial.dtype for trial in drawn} == {torch.float32, torch.float16, torch.bfloat16}
    wanted = {"scaled_attention", *(f"attention({mode})" for mode in SCALINGS)}
    wanted |= {f"{name}({mode})" for name in ("attention_varlen", "attention_decode") for mode in SCALINGS}
    functions = {trial.function for trial in drawn}
    assert wanted <= functions
    assert any("with statistics" in function for function in functions)
    leaves = set("q k v k_cache v_cache query_scale key_scale gain sinks".split())
    assert {name for trial in drawn for name in trial.leaves} == leaves
    options = set("causal window key_lengths key_ranges mask dropout_p softcap return_aux block_table".split())
    options |= {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
    assert {name for trial in drawn for name, value in trial.options.items() if value is not False} == options
    assert {trial.function.partition("(")[0] for trial in drawn if trial.invariant} == {
        trial.function.partition("(")[0] for trial in drawn
    }
    queries = [trial.leaves["q"] for trial in drawn]
    assert {q.is_contiguous() for q in queries} == {True, False}
    assert {q.data_ptr() % 16 == 0 for q in queries} == {True, False}
