"""Gates on the output of `ScaledAttention`: the formula, in every form of a call, and models that have their own."""

import copy
import pickle

import pytest
import torch
from torch.nn.functional import linear

from tests.nn.test_attention import HEADS, WIDTH, D, layer, tokens
from tests.support.layers import assert_same
from tritonattn import attention, nn
from tritonattn.integrations.sdpa import replace_sdpa

ENDS = torch.tensor([0, 3, 3, 9], dtype=torch.int32)
both = pytest.mark.parametrize("gate", ["elementwise", "headwise"])


def by_hand(made, x, visible=None):
    def heads(projection):
        return linear(x, projection.weight, projection.bias).unflatten(-1, (-1, D)).transpose(1, 2)

    q, k, v = (heads(projection) for projection in (made.q_proj, made.k_proj, made.v_proj))
    out = attention(q, k, v, scaling=made.scaling, causal=made.causal, mask=visible, backend="reference")
    opening = 1 / (1 + (-linear(x, made.g_proj.weight, made.g_proj.bias)).exp())  # [B, S, Hq * D or Hq]
    each = opening.repeat_interleave(D, -1) if made.gate == "headwise" else opening
    return linear(out.transpose(1, 2).flatten(2) * each, made.o_proj.weight, made.o_proj.bias)


@both
@pytest.mark.parametrize("bias", [False, True])
def test_every_form_is_the_formula(gate, bias):
    made, x = layer("ssmax:4", kv_heads=2, causal=True, gate=gate, bias=bias), tokens(length=9).requires_grad_()
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "g_proj"}
    assert {name.partition(".")[0] for name in made.state_dict()} == {*names, "scaling"}
    assert made.g_proj.weight.shape == (HEADS * (D if gate == "elementwise" else 1), WIDTH)
    whole = by_hand(made, x)
    assert_same(made, made(x), whole, x)
    packed = made(x[0], cu_seqlens=ENDS, max_seqlen=6)
    assert_same(made, packed, torch.cat([by_hand(made, part[None])[0] for part in x[0].split([3, 6])]), x)
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(copied(x), made(x))
    with torch.no_grad():
        cache, counts = made.cache(2, 9), torch.tensor([5, 3])
        prompt = x[:, :5].clone()
        prompt[1, 3:] = torch.nan
        found = made(prompt, cache=cache, counts=counts)
        for b, count in enumerate(counts.tolist()):
            torch.testing.assert_close(found[b, :count], whole[b, :count])
        hidden = torch.zeros(WIDTH, dtype=x.dtype) if made.o_proj.bias is None else made.o_proj.bias
        assert torch.equal(found[1, 3:], hidden.expand(2, -1))
        step = made(torch.stack([x[0, 5], x[1, 3]])[:, None], cache=cache)
        torch.testing.assert_close(step[:, 0], torch.stack([whole[0, 5], whole[1, 3]]))


@both
def test_the_sigmoid_is_in_fp32(gate):
    """In bf16 a sigmoid of 8 rounds to 1, where its gradient would be 0."""
    made, x = layer(gate=gate, bias=True), tokens()
    with torch.no_grad():
        made.g_proj.weight.zero_()
        made.g_proj.bias.fill_(8)
    exact, rounded = (
        torch.autograd.grad(module(x.to(module.g_proj.weight.dtype)).sum(), module.g_proj.bias)[0]
        for module in (made, copy.deepcopy(made).bfloat16())
    )
    assert (rounded.double() - exact).norm() < 0.05 * exact.norm()


@both
def test_a_gated_layer_compiles_and_is_exported(gate):
    torch._dynamo.reset()
    made, x = layer("ssmax:4", causal=True, gate=gate), tokens(length=9)
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), made(x))
    exported = torch.export.export(made, (x,)).module()
    torch.testing.assert_close(exported(x), made(x))


@both
def test_a_model_s_own_gate_stays(gate):
    """Of a model whose layers call F.scaled_dot_product_attention, with the scaling of a gated layer."""

    class Own(nn.ScaledAttention):
        def forward(self, x):
            q, k, v = self.operands(x)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self._joined(out.transpose(1, 2), x)

    made = layer("log_key_count:4", kv_heads=HEADS, causal=True, gate=gate)
    own = layer(kv_heads=HEADS, causal=True, gate=gate, layer_type=Own)
    own.load_state_dict(made.state_dict())
    x = tokens(length=9)
    with replace_sdpa(own, "log_key_count:4", example=x):
        torch.testing.assert_close(own(x), by_hand(made, x))
    assert not torch.allclose(own(x), made(x))
