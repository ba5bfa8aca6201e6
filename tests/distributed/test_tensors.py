"""DTensors as arguments: batch and heads sharded, against one process."""

from types import SimpleNamespace

import pytest
import torch

import tritonattn
from tritonattn.distributed import HeadParallel

from . import tensors


@pytest.mark.parametrize(
    ("placed", "scaling"),
    [
        ("batch, heads", "key_norm_mean"),
        ("replicas, heads", "ssmax"),
        ("heads", "cosine"),
        ("batch", "per_head"),
        ("heads twice", "power_law"),
    ],
)
def test_results_and_gradients_are_those_of_one_process(pool, placed, scaling):
    assert max(pool.run(tensors.dense, placed, scaling)) < 1e-12


def test_explicit_scales_packed_sequences_and_caches(pool):
    assert max(max(errors.values()) for errors in pool.run(tensors.others)) < 1e-12


def test_operators_have_sharding_rules(pool):
    for errors in pool.run(tensors.operators):
        assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("scaling", ["query_adaptive_ssmax", "power_law"])
def test_a_layer_is_sharded_by_head(pool, scaling):
    assert max(pool.run(tensors.layer, scaling)) < 1e-12


def test_placements_are_refused_by_the_arguments_name(pool):
    wanted = [
        "q: expected its batch or heads sharded, or replicas, got (S(2))",
        "q: expected its batch or heads sharded, or replicas, got (S(3))",
        "k: expected q's mesh, and (S(1)) there, got (R)",
        "v: expected a DTensor, as q is, got a Tensor",
        "k: expected a plain tensor beside a plain q, got a DTensor",
        "k: axis 1: expected a size that 4 ranks divide, got 2",
        "sinks: expected a value for each of q's 8 heads on this rank, got 2 of 8",
        "key_lengths: expected a plain tensor beside a plain q, got a DTensor",
    ]
    for messages in pool.run(tensors.refusals):
        for message, start in zip(messages, wanted, strict=True):
            assert message.replace("Shard(dim=", "S(").replace("))", ")").startswith(start.replace("))", ")")), message


def test_dropout_differs_by_shard_and_agrees_between_replicas(pool):
    for outputs, replicas_agree in pool.run(tensors.dropped):
        assert replicas_agree
        assert not any(torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


def test_parameters_that_are_no_values_of_heads_are_refused_by_name():
    scaling, mesh = tritonattn.nn.SSMax(4), SimpleNamespace(size=lambda: 3)
    with pytest.raises(ValueError, match=r"HeadParallel: expected names of SSMax's parameters, got t$"):
        HeadParallel("s", "t")._apply(scaling, mesh)
    with pytest.raises(ValueError, match=r"s: expected a value a head on the first axis, .* 3 ranks divide, got \[4\]"):
        HeadParallel()._apply(scaling, mesh)
