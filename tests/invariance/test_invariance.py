"""Bits of a sequence alone and in company on a CPU; `python -m tests.invariance` runs many more cases."""

import pytest
import torch

import tritonattn
from tests.invariance.company import cases, differences
from tests.support.calls import operands

CASES = list(cases(35, seed=1, lengths=(16, 300), dims=((64, 64), (20, 33))))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_do_not_depend_on_company(case):
    assert differences(case, "sdpa") == []


def test_without_the_switch_they_do():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 8, 300, 64)
    with tritonattn.batch_invariant():
        on = [tritonattn.attention(*(x[:1, :, :n] for x in (q, k, v)), causal=True) for n in (300, 211)]
        off = tritonattn.attention(q[:1, :, :211], k[:1, :, :211], v[:1, :, :211], causal=True, batch_invariant=False)
    assert torch.equal(on[0][:, :, :211], on[1])
    assert not torch.equal(off, on[1])
    decoded = [
        tritonattn.attention_decode(
            q[:1, :, n - 1 : n], k[:1], v[:1], key_lengths=torch.tensor([n]), batch_invariant=switch
        )
        for n, switch in ((211, True), (211, False))
    ]
    assert torch.equal(decoded[0][:, :, 0], on[0][:, :, 210])
    plain = tritonattn.attention(q[:1], k[:1], v[:1], causal=True)
    assert not torch.equal(decoded[1][:, :, 0], plain[:, :, 210])


@pytest.mark.parametrize(
    ("arguments", "named"), [({"dropout_p": 0.5}, "dropout_p"), ({"backend": "reference"}, "reference")]
)
def test_refusals(arguments, named):
    with pytest.raises(NotImplementedError, match=f"batch_invariant.*{named}"):
        tritonattn.attention(**operands(), batch_invariant=True, **arguments)
    with pytest.raises(TypeError, match="batch_invariant"):
        tritonattn.attention(**operands(), batch_invariant=1)


def test_a_bias_of_keys():
    torch.manual_seed(0)
    bias, grad = torch.randn(2, 4, 300), torch.randn(2, 4, 300, 32)
    q, k, v = torch.randn(2, 4, 300, 32), torch.randn(2, 2, 300, 32), torch.randn(2, 2, 300, 32)
    found = []
    for entries, n in ((slice(0, 2), 300), (slice(0, 1), 171)):
        operands = [x[entries, :, :n].clone().requires_grad_() for x in (q, k, v, bias)]
        lengths = {"key_lengths": torch.tensor([171, 300])} if n == 300 else {}
        upstream = grad[entries, :, :n].clone()
        upstream[0, :, 171:] = 0
        out = tritonattn.attention(*operands[:3], key_bias=operands[3], causal=True, batch_invariant=True, **lengths)
        found.append([x[0, :, :171] for x in (out, *torch.autograd.grad(out, operands, upstream))])
    assert all(map(torch.equal, *found))


def test_layers_and_patches_hand_it_on():
    layer = tritonattn.nn.ScaledAttention(32, heads=2, backend="reference", batch_invariant=True)
    with pytest.raises(NotImplementedError, match="batch_invariant"):
        layer(torch.randn(1, 3, 32))
    transformers = pytest.importorskip("transformers")
    from tests.support.llama import llama
    from tritonattn.huggingface import patch

    model = llama()
    ids = torch.ones(1, 5, dtype=torch.int64)
    with patch(model, backend="reference", batch_invariant=True), pytest.raises(NotImplementedError, match="invariant"):
        model(ids)
    with patch(model, batch_invariant=True) as patched:
        saved = next(iter(patched.layers.values())).to_config()
        assert saved["batch_invariant"] is True
        assert isinstance(model(ids), transformers.utils.ModelOutput)


def test_kernels_refuse_scaled_gradients_of_fp16():
    from tritonattn.calls.dispatch import _refuse_scaled_halves
    from tritonattn.core.call import Logits

    q = torch.ones(1, 1, 1, 8, dtype=torch.float16, requires_grad=True)
    _refuse_scaled_halves(q, Logits(1.0), q, q)
    with pytest.raises(NotImplementedError, match=r"batch_invariant.*float16"):
        _refuse_scaled_halves(q, Logits(1.0, torch.ones(1, 1, 1)), q, q)
