"""ALiBi and forget gates against the formulas of their papers, written out densely in float64."""

import pytest
import torch

from tests.support.caches import sequences
from tests.support.refusals import refuses
from tritonattn import attention, attention_decode, attention_varlen, nn

B, H, S, WIDTH = 2, 4, 24, 5


def softmax_attention(q, k, v, pairs):
    """softmax(q k^T / sqrt(D) + pairs) v over the lower triangle."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = q @ k.mT / q.shape[-1] ** 0.5 + pairs
    return logits.masked_fill(~torch.ones_like(logits).tril().bool(), -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [(1, [2**-8]), (4, [2**-2, 2**-4, 2**-6, 2**-8]), (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])],
)
def test_alibi(heads, slopes):
    q, k, v = sequences(heads=(heads, heads), length=S)
    position = torch.arange(S)
    pairs = torch.tensor(slopes).double()[:, None, None] * (position - position[:, None])
    alibi = nn.ALiBi(heads)
    assert torch.equal(nn.ALiBi(heads, device="meta").to(torch.bfloat16).to_empty(device="cpu")(S), alibi(S))
    assert alibi.slopes.tolist() == slopes
    for backend in ("sdpa", "reference"):
        out = attention(q, k, v, causal=True, key_bias=alibi(S), backend=backend)
        torch.testing.assert_close(out, softmax_attention(q, k, v, pairs))
    lengths = torch.full((B,), S)
    cache = [torch.nn.functional.pad(x, (0, 0, 0, 8)) for x in (k, v)]
    step = attention_decode(q[:, :, -2:], *cache, key_lengths=lengths, key_bias=alibi(S + 8))
    torch.testing.assert_close(step, softmax_attention(q, k, v, pairs)[:, :, -2:])


@pytest.mark.parametrize("lengths", [(S, S), (5, S)])
def test_alibi_on_both_sides(lengths):
    q, k, v = sequences(heads=(H, H), length=S)
    q = q[:, :, -lengths[0] :]
    position = torch.arange(S)
    distance = (position[-lengths[0] :, None] - position).abs()
    pairs = -torch.tensor([2**-2, 2**-4, 2**-6, 2**-8]).double()[:, None, None] * distance
    alibi = nn.ALiBi(H, bidirectional=True)
    wanted = (q @ k.mT / q.shape[-1] ** 0.5 + pairs).softmax(-1) @ v
    for backend in ("sdpa", "reference"):
        out = attention(q, k, v, relative_bias=alibi(S), relative_right=S - 1, backend=backend)
        torch.testing.assert_close(out, wanted)
    refuses("ValueError: keys: expected at least 1, got 0", alibi, 0)
    alibi.sequence_part = object()
    refuses("NotImplementedError: ~ bidirectional=False under ContextParallel", alibi, S)


def forgetting(gate, x):
    """D[i, j] = sum of ln f over j < l <= i, from the paper's equation; [B, H, S, S]."""
    log_f = torch.sigmoid(x @ gate.proj.weight.T + gate.proj.bias).log().mT
    between = torch.zeros(*log_f.shape, S, dtype=torch.float64)
    for i in range(S):
        for j in range(i):
            between[..., i, j] = log_f[..., j + 1 : i + 1].sum(-1)
    return between


def test_forget_gates_their_gradients_packed_sequences_and_decoding():
    torch.manual_seed(0)
    (q, k, v), x = sequences(length=S), torch.randn(B, S, WIDTH).double().requires_grad_()
    gate = nn.ForgetGate(WIDTH, H, dtype=torch.float64)
    leaves = (x, gate.proj.weight, gate.proj.bias)
    wanted = softmax_attention(q, k, v, forgetting(gate, x))
    expected = torch.autograd.grad(wanted.square().sum(), leaves)
    for backend in ("sdpa", "reference"):
        out = attention(q, k, v, causal=True, key_bias=gate(x), backend=backend)
        torch.testing.assert_close(out, wanted)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), leaves), expected)
    wanted = wanted.detach()
    ends = torch.tensor([0, S, 2 * S], dtype=torch.int32)
    tokens = (y.transpose(1, 2).flatten(0, 1) for y in (q, k, v))
    packed = attention_varlen(*tokens, ends, ends, S, S, causal=True, key_bias=gate(x.flatten(0, 1)))
    torch.testing.assert_close(packed.detach().unflatten(0, (B, S)).transpose(1, 2), wanted)
    with torch.no_grad():
        first = gate(x[:, : S - 1])
        bias = torch.cat([first, gate(x[:, S - 1 :], first[..., -1])], -1)
        step = attention_decode(q[:, :, -1:], k, v, key_lengths=torch.full((B,), S), key_bias=bias)
    torch.testing.assert_close(step, wanted[:, :, -1:])


def test_a_layer_takes_biases_in_every_form():
    torch.manual_seed(0)
    layer = nn.ScaledAttention(16, heads=4, kv_heads=2, causal=True).double()
    x, alibi = torch.randn(2, 6, 16).double(), nn.ALiBi(4)
    whole = layer(x, key_bias=alibi(6))
    assert not torch.allclose(whole, layer(x))
    ends = torch.tensor([0, 6, 12], dtype=torch.int32)
    packed = layer(x.flatten(0, 1), cu_seqlens=ends, max_seqlen=6, key_bias=alibi(12))
    torch.testing.assert_close(packed.unflatten(0, (2, 6)), whole)
    with torch.no_grad():
        cache = layer.cache(2, 8)
        parts = [layer(part, cache=cache, key_bias=alibi(8)) for part in (x[:, :5], x[:, 5:])]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
