"""ALiBi and forget gates against the formulas of their papers, written out densely in float64."""

import pytest
import torch

from tests.support.caches import sequences
from tests.support.refusals import refuses
from tritonattn import Scales, Scaling, attention, attention_decode, attention_varlen, check_scaling, nn

B, H, S, WIDTH = 2, 4, 24, 5


def softmax_attention(q, k, v, pairs, sinks=None, softcap=None):
    """softmax(cap(q k^T / sqrt(D)) + pairs) v over the lower triangle; sinks [B, H, S] join the denominator."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = q @ k.mT / q.shape[-1] ** 0.5
    logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) + pairs
    logits = logits.masked_fill(~torch.ones_like(logits).tril().bool(), -torch.inf)
    if sinks is None:
        return logits.softmax(-1) @ v
    return torch.cat([logits, sinks[..., None]], -1).softmax(-1)[..., :-1] @ v


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


@pytest.mark.parametrize("sinks", [False, True])
def test_a_layer_takes_biases_in_every_form(sinks):
    torch.manual_seed(0)
    layer = nn.ScaledAttention(16, heads=4, kv_heads=2, causal=True, sinks=sinks).double()
    if sinks:
        torch.nn.init.normal_(layer.sinks)
    x, alibi = torch.randn(2, 6, 16).double(), nn.ALiBi(4)
    whole = layer(x, key_bias=alibi(6))
    assert not torch.allclose(whole, layer(x))
    torch.testing.assert_close(layer(x[:, :4], key_bias=alibi(4)), whole[:, :4])
    ends = torch.tensor([0, 6, 12], dtype=torch.int32)
    packed = layer(x.flatten(0, 1), cu_seqlens=ends, max_seqlen=6, key_bias=alibi(12))
    torch.testing.assert_close(packed.unflatten(0, (2, 6)), whole)
    with torch.no_grad():
        cache = layer.cache(2, 8)
        parts = [layer(part, cache=cache, key_bias=alibi(8)) for part in (x[:, :5], x[:, 5:])]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def gated(dtype=torch.float64):
    """A gate with its x, and operands of the same sequences, in which queries share key heads."""
    torch.manual_seed(0)
    gate, x = nn.ForgetGate(WIDTH, H, dtype=torch.float64), torch.randn(B, S, WIDTH).double().requires_grad_()
    return gate, x, [y.requires_grad_() for y in sequences(dtype, heads=(H, 2), length=S)]


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("shape", [(H,), (H, 1), (B, H, S)], ids=str)
def test_sinks_join_the_papers_logits(shape, backend):
    """Values and every gradient, with a softcap before the bias too."""
    gate, x, operands = gated()
    sinks = torch.randn(shape, dtype=torch.float64).requires_grad_()
    leaves = (*operands, sinks, x, gate.proj.weight)
    of_rows = (sinks if sinks.dim() > 1 else sinks[:, None]).expand(B, H, S)
    for softcap in (None, 1.5):
        wanted = softmax_attention(*operands, forgetting(gate, x), of_rows, softcap)
        options = {"sinks": sinks, "softcap": softcap, "bias_after_softcap": True, "backend": backend}
        out = attention(*operands, causal=True, key_bias=gate(x), **options)
        torch.testing.assert_close(out, wanted)
        of_out, of_wanted = (torch.autograd.grad(y.square().sum(), leaves) for y in (out, wanted))
        torch.testing.assert_close(of_out, of_wanted)


def test_sinks_with_alibi_do_not_depend_on_what_follows():
    """Neither later tokens nor neighbours in a pack change a row; a bias without a mark shifts against the sinks."""
    q, k, v = (x[:1] for x in sequences(heads=(H, H), length=64))
    alibi, sinks = nn.ALiBi(H), torch.linspace(-1, 2, H, dtype=torch.float64)
    position = torch.arange(4)
    pairs = alibi.slopes.double()[:, None, None] * (position - position[:, None])
    first = [x[:, :, :4] for x in (q, k, v)]
    wanted = softmax_attention(*first, pairs, sinks[:, None].expand(1, H, 4))
    options = {"causal": True, "sinks": sinks}
    for length in (4, 8, 64):
        given = (x[:, :, :length] for x in (q, k, v))
        torch.testing.assert_close(attention(*given, key_bias=alibi(length), **options)[:, :, :4], wanted)
    assert not torch.allclose(attention(*first, key_bias=alibi(8).clone()[:, :4], **options), wanted)
    for before in (0, 7):
        starts = torch.tensor([0, before, before + 4, 64], dtype=torch.int32)
        tokens = [torch.cat([x[:, :, 64 - before :], x[:, :, : 64 - before]], 2)[0].transpose(0, 1) for x in (q, k, v)]
        packed = attention_varlen(*tokens, starts, starts, 64, 64, key_bias=alibi(64), **options)
        torch.testing.assert_close(packed[before : before + 4].transpose(0, 1)[None], wanted)


class Decaying(Scaling):
    """The bias (j - i) / 8, whose term of the row `scales` leaves out."""

    name, reads_keys = "decaying", False

    def scales(self, q, k, visibility, statistics):
        keys = torch.arange(k.shape[2], device=q.device).double()[None] / 8
        return Scales(q.shape[-1] ** -0.5, key_bias=nn.counted_from_rows(keys))

    def multiplier(self, q, k, visible):
        return q.shape[-1] ** -0.5

    def relative_addend(self, q, k, distance):
        return -distance.double() / 8


def test_a_scaling_with_a_bias_that_counts_from_rows():
    (q, k, v), sinks = sequences(heads=(H, 2), length=S), torch.randn(H, dtype=torch.float64)
    options = {"scaling": Decaying(), "causal": True, "sinks": sinks}
    torch.testing.assert_close(*(attention(q, k, v, **options, backend=one) for one in ("sdpa", "reference")))
    assert max(check_scaling(Decaying()).values()) < 1e-6


def test_a_softcap_over_a_bias_that_counts_from_rows_is_refused():
    (q, k, v), alibi = sequences(heads=(H, H), length=S), nn.ALiBi(H)
    message = "NotImplementedError: softcap: ~ ALiBi and ForgetGate ~ (bias_after_softcap=True)"
    for options in ({"key_bias": alibi(S)}, {"scaling": Decaying()}):
        refuses(message, attention, q, k, v, causal=True, softcap=2.0, **options)
        attention(q, k, v, causal=True, softcap=2.0, bias_after_softcap=True, **options)
    layer = nn.ScaledAttention(16, heads=4, causal=True, softcap=2.0)
    refuses(message, layer, torch.randn(2, 6, 16), key_bias=alibi(6))
    refuses("TypeError: key_bias: expected a tensor, got list", nn.counted_from_rows, [0.0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tracing_keeps_and_guards_the_mark():
    (q, k, v), alibi = sequences(torch.float32, heads=(H, H), length=S), nn.ALiBi(H)
    sinks = torch.linspace(-1, 2, H)

    def attend(bias):
        return attention(q, k, v, causal=True, key_bias=bias, sinks=sinks)

    marked, plain = alibi(S), alibi(S).clone()
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for bias in (marked, plain, marked):
        torch.testing.assert_close(compiled(bias), attend(bias))
    whole = torch.compile(lambda: attend(alibi(S)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(), attend(marked))
    assert not torch.allclose(attend(marked), attend(plain))
