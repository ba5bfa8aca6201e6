"""Calls of transformers as calls of ours, and refusals by name."""

import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers

import tritonattn
from tests.support.refusals import refuses
from tritonattn.huggingface import attention_forward, register, unregister
from tritonattn.huggingface.context_parallel import over_ranks


def module_with(**settings) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(tritonattn=settings), is_causal=True)


@pytest.mark.parametrize("scaling", ["sqrt_dim", "key_norm_mean", "none", "cosine"])
def test_the_configs_scaling_is_relative_to_the_models(scaling):
    """logit = model_scaling * sqrt(D) * gain * factor * (q . k); cosine replaces the model's scaling."""
    q, k, v = torch.randn(3, 1, 2, 7, 8)
    out, weights = attention_forward(module_with(scaling=scaling, gain=2.0), q, k, v, None, scaling=0.3)
    gain = 2.0 if scaling == "cosine" else 2.0 * 0.3 * 8**0.5
    wanted = tritonattn.attention(q, k, v, scaling=scaling, gain=gain, causal=True)
    assert weights is None
    torch.testing.assert_close(out, wanted.transpose(1, 2))


def test_a_scaling_that_the_model_learns_gets_its_gradient():
    q, k, v = torch.randn(3, 1, 2, 7, 16)
    scaling = torch.tensor(0.3, requires_grad=True)
    for settings in ({}, {"scaling": "key_count"}, {"scaling": "sqrt_dim", "gain": 2.0}):
        out, _ = attention_forward(module_with(**settings), q, k, v, None, scaling=scaling)
        wanted, _ = attention_forward(module_with(**settings), q, k, v, None, scaling=0.3)
        torch.testing.assert_close(out, wanted)
        (gradient,) = torch.autograd.grad(out.square().sum(), scaling)
        assert gradient != 0


def test_dropout_backend_and_invariance_reach_the_call():
    q, k, v = torch.randn(3, 1, 2, 7, 8)
    torch.manual_seed(0)
    out, _ = attention_forward(module_with(), q, k, v, None, dropout=0.5)
    torch.manual_seed(0)
    wanted = tritonattn.attention(q, k, v, causal=True, dropout_p=0.5)
    torch.testing.assert_close(out, wanted.transpose(1, 2), rtol=0, atol=0)
    invariant = module_with(backend="reference", batch_invariant=True)
    refuses("NotImplementedError: batch_invariant ~ reference", attention_forward, invariant, q, k, v, None)


@pytest.mark.parametrize(
    "name", "relative_position_bias block_table cache indices block_indices sinks head_mask".split()
)
def test_unsupported_arguments_are_refused_by_name(name):
    q, module = torch.randn(1, 2, 3, 4), SimpleNamespace(is_causal=True)
    with pytest.raises(NotImplementedError, match=name):
        attention_forward(module, q, q, q, None, scaling=0.5, **{name: torch.zeros(1)})
    attention_forward(module, q, q, q, None, scaling=0.5, **{name: None})


def test_a_sink_for_each_token():
    """[B, Hq, Q, 1], also of packed requests; next to one a head it is refused."""
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    module, sinks = module_with(), torch.randn(1, 2, 5, 1).requires_grad_()
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    requests: dict[str, Any] = {"read_index": torch.arange(5), "max_length_q": 3, "max_length_k": 3}
    requests |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    ranges = torch.tensor([[0, 1], [0, 2], [2, 3], [2, 4], [2, 5]])[None]
    for packing, masks in (({}, {"causal": True}), (requests, {"key_ranges": ranges})):
        out, _ = attention_forward(module, q, k, v, None, sinks=sinks, **packing)
        wanted = tritonattn.attention(q, k, v, sinks=sinks[..., 0], **masks).transpose(1, 2)
        torch.testing.assert_close(out, wanted)
        gradients = (torch.autograd.grad(x.square().sum(), sinks) for x in (out, wanted))
        torch.testing.assert_close(*gradients)
    both = {"sinks": sinks, "s_aux": torch.zeros(2)}
    refuses("NotImplementedError: sinks: ~ one for each query", attention_forward, module, q, k, v, None, **both)


@pytest.mark.parametrize("compiling", [False, True])
def test_other_numbers_of_an_additive_mask_are_a_bias(compiling, monkeypatch):
    """With a position_bias they are added; keys behind the mask stay invisible, and are not counted."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    q, k, v = torch.randn(3, 1, 2, 3, 4)
    visible = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    bias, position_bias = torch.randn(1, 1, 3, 3), torch.randn(1, 2, 3, 5).requires_grad_()
    module = module_with(scaling="key_count")
    additive = bias.masked_fill(~visible, torch.finfo(q.dtype).min)
    out, _ = attention_forward(module, q, k, v, additive, scaling=0.5, position_bias=position_bias)
    (gradient,) = torch.autograd.grad(out.square().sum(), position_bias)
    count = visible.sum(-1, keepdim=True)
    logits = q @ k.mT / count + bias + position_bias[..., :3]
    wanted = logits.masked_fill(~visible, -torch.inf).softmax(-1) @ v
    (expected,) = torch.autograd.grad(wanted.transpose(1, 2).square().sum(), position_bias)
    torch.testing.assert_close(out, wanted.transpose(1, 2))
    torch.testing.assert_close(gradient, expected)


def test_a_bias_of_other_tokens_is_refused_by_name():
    q, bias, context = torch.randn(1, 2, 3, 4), torch.zeros(1, 2, 3, 3), cast(Any, None)  # of no ranks
    packed = {"read_index": torch.arange(3), "cu_seq_lens_q": torch.tensor([0, 3]).int(), "position_bias": bias}
    message = "NotImplementedError: position_bias: a bias of pairs of packed requests is not supported"
    refuses(message, attention_forward, SimpleNamespace(), q, q, q, None, 0.5, **packed)
    message = "NotImplementedError: position_bias: expected none under context_parallel"
    refuses(message, over_ranks, torch.nn.Identity(), q, q, q, {"dropout_p": 0.0, "bias": bias}, {}, context)


def test_a_mask_of_more_keys_than_there_are_is_cut():
    """Some models cut the mask of a static cache to its keys."""
    q, module = torch.randn(1, 2, 3, 4), SimpleNamespace()
    visible = torch.ones(1, 1, 3, 5, dtype=torch.bool).tril()
    wanted = attention_forward(module, q, q, q, visible[..., :3], scaling=0.5)[0]
    for mask in (visible, torch.zeros(1, 1, 3, 5).masked_fill(~visible, -torch.inf)):
        assert torch.equal(attention_forward(module, q, q, q, mask, scaling=0.5)[0], wanted)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_lengths_of_other_keys_than_rows(causal):
    """Bottom-right in every document; rows past the last document attend to nothing."""
    q, (k, v) = torch.randn(1, 2, 11, 4), torch.randn(2, 1, 2, 13, 4)
    ends = {"cu_seq_lens_q": torch.tensor([0, 4, 6, 9]).int(), "cu_seq_lens_k": torch.tensor([0, 3, 9, 12]).int()}
    out, _ = attention_forward(SimpleNamespace(), q, k, v, None, scaling=0.5, is_causal=causal, **ends)
    pairs = [(slice(0, 4), slice(0, 3)), (slice(4, 6), slice(3, 9)), (slice(6, 9), slice(9, 12))]
    parts = [
        tritonattn.attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], scaling=0.5, causal=causal)
        for rows, keys in pairs
    ]
    torch.testing.assert_close(out[:, :9], torch.cat(parts, dim=2).transpose(1, 2))
    assert (out[:, 9:] == 0).all()
    with pytest.raises(NotImplementedError, match="sliding_window"):
        attention_forward(SimpleNamespace(), q, k, v, None, scaling=0.5, is_causal=causal, sliding_window=2, **ends)


def test_a_window_without_a_mask():
    q, k, v = torch.randn(3, 1, 2, 9, 4)

    def run(size: int, causal: bool = True) -> torch.Tensor:
        module = SimpleNamespace(is_causal=causal)
        return attention_forward(module, q, k, v, None, scaling=0.5, sliding_window=size)[0].transpose(1, 2)

    torch.testing.assert_close(run(3), tritonattn.attention(q, k, v, scaling=0.5, causal=True, window=(2, None)))
    for causal in (True, False):
        torch.testing.assert_close(run(9, causal), tritonattn.attention(q, k, v, scaling=0.5, causal=causal))
    with pytest.raises(NotImplementedError, match="sliding_window"):
        run(3, causal=False)


def test_ulysses_of_another_implementation_is_refused(monkeypatch):
    """UlyssesSPAttentionHF replaces the function of one name; layers of other names would attend to a part."""
    home, interface = "deepspeed.runtime.sequence_parallel.ulysses_sp", transformers.AttentionInterface
    q, stand_in = torch.randn(1, 2, 3, 4), lambda *arguments, **keywords: None
    stand_in.__module__ = home
    monkeypatch.setitem(sys.modules, home, SimpleNamespace())
    monkeypatch.setitem(interface._global_mapping, "sdpa", stand_in)
    with pytest.raises(NotImplementedError, match=r"shares sequences over ranks in layers of sdpa, .*patch all layers"):
        attention_forward(module_with(), q, q, q, None)
    monkeypatch.setitem(interface._global_mapping, "tritonattn", stand_in)
    attention_forward(module_with(), q, q, q, None)


def test_a_name_is_taken_back_with_its_masks():
    interfaces = transformers.AttentionInterface(), transformers.AttentionMaskInterface()
    for change, is_known in ((register, True), (unregister, False)):
        change("tritonattn_twice")
        assert [("tritonattn_twice" in interface.valid_keys()) for interface in interfaces] == [is_known] * 2
