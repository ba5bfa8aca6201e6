"""ScaledAttention: its arithmetic in plain PyTorch, gradients, masks, packing and caches."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch.nn.functional import linear, rms_norm

from tests.calls.test_distances import Near
from tests.support.layers import assert_same
from tests.support.masks import MASKS, visible_pairs
from tests.support.pairs import in_turn, pairwise
from tests.support.refusals import refuses
from tritonattn import attention, nn
from tritonattn.calls.checks import FLOATS
from tritonattn.nn.rotary import rotated
from tritonattn.scaling import LogKeyCount

WIDTH, HEADS, KV, D = 24, 4, 2, 6
SCALED = ["sqrt_dim", "key_norm_mean", "log_key_count", "cosine", "ssmax", "power_law", "learned_log_power", 0.4]


def layer(scaling="sqrt_dim", seed=0, kv_heads=KV, layer_type=nn.ScaledAttention, **arguments):
    torch.manual_seed(seed)
    made = layer_type(WIDTH, HEADS, kv_heads=kv_heads, scaling=scaling, dtype=torch.float64, **arguments)
    with torch.no_grad():
        for parameter in made.parameters():  # weights of a size that makes the softmax matter
            parameter += 0.3 * torch.randn_like(parameter)
    return made


def tokens(batch=2, length=7, seed=1, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, width, dtype=torch.float64, generator=generator)


def by_hand(layer, x, context=None, visible=None, softcap=None):
    """The projections and norms in plain PyTorch, around the reference."""
    y = x if context is None else context

    def heads(projection, z):
        return linear(z, projection.weight, projection.bias).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)

    q, k, v = heads(layer.q_proj, x), heads(layer.k_proj, y), heads(layer.v_proj, y)
    if isinstance(layer.q_norm, torch.nn.RMSNorm):
        q = rms_norm(q, (layer.head_dim,), layer.q_norm.weight, 1e-6)
        k = rms_norm(k, (layer.head_dim,), layer.k_norm.weight, 1e-6)
    options = {"scaling": layer.scaling, "mask": visible, "softcap": softcap, "sinks": layer.sinks}
    out = attention(q, k, v, backend="reference", **options)
    return linear(out.transpose(1, 2).flatten(2), layer.o_proj.weight, layer.o_proj.bias)


@pairwise(scaling=SCALED, qk_norm=[False, True], kv_heads=[1, 2, 4], causal=[False, True], head_dim=[None, 5])
def test_self_attention(scaling, qk_norm, kv_heads, causal, head_dim):
    made = layer(scaling, kv_heads=kv_heads, qk_norm=qk_norm, causal=causal, head_dim=head_dim, bias=True)
    x = tokens().requires_grad_()
    assert_same(made, made(x), by_hand(made, x, visible=visible_pairs((2, HEADS, 7, 7), causal=causal)), x)


@in_turn(mask=["lengths", "ranges", "mask", "mask of heads"], scaling=["key_norm_mean", "ssmax"])
def test_masks(mask, scaling):
    made, x = layer(scaling, causal=True, window=(4, 0), softcap=1.5, sinks=True), tokens().requires_grad_()
    masks = MASKS[mask](2, HEADS, 7, 7)
    visible = visible_pairs((2, HEADS, 7, 7), causal=True, window=(4, 0), **masks)
    attends = visible.any(-1).all(1)  # [B, Sq]
    ours, expected = made(x, **masks), by_hand(made, x, visible=visible, softcap=1.5)
    assert_same(made, ours[attends], expected[attends], x)


def test_dropout_is_for_training_and_invariance_reaches_the_call():
    x = tokens()
    plain, dropping = layer(causal=True), layer(causal=True, dropout_p=0.5)
    torch.testing.assert_close(dropping.eval()(x), plain(x), rtol=0, atol=0)
    assert (dropping.train()(x) - plain(x)).abs().max() > 0.1
    refuses("NotImplementedError: batch_invariant ~ reference", layer(backend="reference", batch_invariant=True), x)


@pytest.mark.parametrize(
    ("base", "options", "most"),
    [
        (8, {"causal": True, "window": (6, 0)}, 7),
        (8, {"causal": True, "window": (6, 3)}, 7),
        (8, {"window": (3, 3)}, 7),
        (7, {"causal": True, "window": (6, 0)}, None),
        (8, {"window": (3, None)}, None),
        (8, {"causal": True}, None),
    ],
)
@pytest.mark.parametrize("make", [LogKeyCount, lambda base: nn.SSMax(HEADS, base)], ids=["log_key_count", "ssmax"])
def test_a_base_above_the_window_warns(make, base, options, most, recwarn):
    layer(make(base), **options)
    said = [str(one.message) for one in recwarn if "window" in str(one.message)]
    assert [one.partition(":")[0] for one in said] == ["scaling"] * (most is not None)
    assert all(f"base of at most {most}, the keys in window=" in one and "got 8" in one for one in said)


def test_cross_attention():
    made = layer("key_norm_mean", context_width=10)
    x, context = tokens().requires_grad_(), tokens(length=5, width=10).requires_grad_()
    lengths = torch.tensor([3, 5])
    visible = visible_pairs((2, HEADS, 7, 5), key_lengths=lengths)
    expected = by_hand(made, x, context, visible)
    assert_same(made, made(x, context, key_lengths=lengths), expected, x, context)
    rotated = Rotated(WIDTH, HEADS, kv_heads=KV, context_width=10, scaling="key_norm_mean", dtype=torch.float64)
    rotated.load_state_dict(made.state_dict())
    assert torch.equal(rotated(x, context), made(x, context))  # it has no positions


@pytest.mark.parametrize("scaling", ["key_norm_mean", "ssmax"])
def test_packed_sequences_are_as_separate_ones(scaling):
    made = layer(scaling, causal=True, window=(3, 0), softcap=1.5, sinks=True, qk_norm=True)
    x = tokens(batch=1, length=12)[0].requires_grad_()
    ends = torch.tensor([0, 3, 3, 11], dtype=torch.int32)
    ours = made(x, cu_seqlens=ends, max_seqlen=8)
    alone = [made(x[None, a:b])[0] for a, b in ((0, 3), (3, 11))]
    assert_same(made, ours[:11], torch.cat(alone), x)
    assert not ours[11:].any()


class Rotated(nn.ScaledAttention):
    """With rotary positions on the first two components of every head, and lengths that say the absolute position."""

    def positioned(self, q, k, positions):
        angle = positions[:, None].double()  # [B or 1, 1, Sq]

        def turned(x):
            a, b, rest = x[..., 0], x[..., 1], x[..., 2:]
            pair = torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
            return torch.cat([pair, rest], -1) * (1 + 0.1 * angle[..., None])

        return turned(q), turned(k)


@pytest.mark.parametrize(("layer_type", "rotary"), [(Rotated, None), (nn.ScaledAttention, 50.0)])
@torch.no_grad()
def test_positions_reach_a_layer_in_every_form(layer_type, rotary):
    torch.manual_seed(0)
    made = layer_type(WIDTH, HEADS, scaling="per_head", causal=True, rotary=rotary, dtype=torch.float64)
    x = 2 * tokens(length=9)
    whole = made(x)
    plain = nn.ScaledAttention(WIDTH, HEADS, scaling="per_head", causal=True, dtype=torch.float64)
    plain.load_state_dict(made.state_dict())
    assert not torch.allclose(plain(x), whole)
    cache = made.cache(2, 9)
    pieces = [made(x[:, a:b], cache=cache) for a, b in ((0, 5), (5, 6), (6, 9))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    packed = made(torch.cat([x[0, :4], x[1]]), cu_seqlens=torch.tensor([0, 4, 13], dtype=torch.int32), max_seqlen=9)
    torch.testing.assert_close(packed, torch.cat([whole[0, :4], whole[1]]))


@torch.no_grad()
def test_rotary_positions_turn_complex_pairs():
    """(x[d], x[d + D / 2]) as a complex number, times exp(i position base^(-2 d / D))."""
    made, plain = (layer(qk_norm=True, causal=True, rotary=base) for base in (50.0, None))
    x, positions = 2 * tokens(length=9), torch.arange(9)
    angles = positions[:, None] * 50.0 ** (-torch.arange(D // 2).double() / (D // 2))
    turn = torch.polar(torch.ones_like(angles), angles)
    q, k, v = plain.operands(x)
    for ours, given in zip(made.operands(x), (q, k), strict=False):
        wanted = torch.complex(*given.chunk(2, dim=-1)) * turn
        torch.testing.assert_close(torch.complex(*ours.chunk(2, dim=-1)), wanted)
        half = rotated(given.bfloat16(), positions[None], 50.0)
        torch.testing.assert_close(half, torch.cat([wanted.real, wanted.imag], -1).bfloat16(), rtol=2e-2, atol=2e-2)
    assert torch.equal(made.operands(x)[2], v)


@pairwise(
    scaling=[*SCALED, "key_norm_max", "per_head", "learned_cosine"],
    window=[None, (4, 0)],
    pieces=[([20, 20], [1, 1], [3, 3], [1, 1]), ([17, 3], [0, 3], [4, 1], [1, 1], [0, 14])],  # next to a full sequence
    layer_type=[nn.ScaledAttention, Rotated],
)
@torch.no_grad()
def test_a_prompt_and_pieces_are_one_pass(scaling, window, pieces, layer_type):
    """As where one sequence takes more guessed tokens than the other; positions are those of each sequence."""
    options = {"window": window, "qk_norm": True, "softcap": 5.0, "sinks": True}
    made = layer(scaling, layer_type=layer_type, causal=True, **options)
    x = 2 * tokens(length=40)
    whole, cache = made(x), made.cache(batch=2, capacity=22 if pieces[0] == [17, 3] else 30)
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    for counts in pieces:
        rows = cache.lengths[:, None] + torch.arange(max(counts))
        piece, expected = (z.gather(1, rows[..., None].expand(-1, -1, WIDTH)) for z in (x, whole))
        for b, count in enumerate(counts):
            piece[b, count:] = torch.nan
        found = made(piece, cache=cache, counts=None if counts[0] == counts[1] else torch.tensor(counts))
        for b, count in enumerate(counts):
            torch.testing.assert_close(found[b, :count], expected[b, :count])
            assert not found[b, count:].any()
    assert cache.lengths.tolist() == [sum(taken) for taken in zip(*pieces, strict=True)]


@torch.no_grad()
def test_a_full_cache_refuses_more_keys():
    made, x = layer(causal=True), tokens(length=5)
    cache = made.cache(2, 5)
    made(x[:, :4], cache=cache)
    held = cache.k.clone()
    refuses("ValueError: x: expected at most capacity = 5 keys, got 6", made, x[:, :2], cache=cache)
    refuses("ValueError: x: expected the cache's 2 sequences, got shape [1, ", made, x[:1, :1], cache=cache)
    assert torch.equal(cache.k, held)
    assert cache.lengths.tolist() == [4, 4]


def test_norms_of_16_bit_keys_are_not_rounded_to_16_bits():
    k_new, held = tokens().unflatten(-1, (HEADS, D)).transpose(1, 2), {}
    for dtype in FLOATS:
        with contextlib.suppress(TypeError):  # of statistics in 16 bits
            cache = nn.KeyValueCache(2, HEADS, 7, D, dtype=dtype)
            cache.append(k_new.to(dtype), k_new.to(dtype))
            held[dtype] = cache.statistics.norms
    assert [x.dtype for x in held.values()] == [torch.promote_types(dtype, torch.float32) for dtype in FLOATS]
    for dtype, norms in held.items():
        torch.testing.assert_close(norms.double(), k_new.to(dtype).double().norm(dim=-1), rtol=1e-6, atol=0)


@torch.no_grad()
def test_a_cache_of_another_layer_is_refused():
    first, second, x = layer(causal=True), layer(causal=True, seed=2), tokens(length=5)
    cache = first.cache(2, 9)
    prompt = first(x, cache=cache)
    refuses("ValueError: cache: expected one that this layer alone fills, got one with", second, x, cache=cache)
    assert cache.lengths.tolist() == [5, 5]
    for copied in (pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)):
        second(x[:, :1], cache=copied)
    first(x[:, :1], cache=cache)
    cache.reset()
    torch.testing.assert_close(second(x, cache=cache), second(x))
    assert not torch.equal(prompt, second(x))


def test_a_printed_layer_names_its_scaling():
    sizes = f"heads={HEADS}, kv_heads={KV}, head_dim={D}, causal=False"
    for scaling, said in ((0.5, ", scaling=0.5"), (LogKeyCount(8.0), ", scaling=LogKeyCount(base=8.0)"), ("ssmax", "")):
        assert f"\n  {sizes}{said}\n" in repr(layer(scaling))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning", "ignore:.torch.jit.script")
def test_a_compiled_layer_trains_in_one_graph():
    torch._dynamo.reset()
    made, x = layer("ssmax", causal=True, qk_norm=True), tokens()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(x).square().sum(), list(made.parameters())) for f in (compiled, made)]
    torch.testing.assert_close(*results)


@torch.no_grad()
def test_beams_and_guesses():
    made, x = layer("key_norm_sum", causal=True), tokens(length=12)
    cache = made.cache(2, 16)
    made(x[:, :8], cache=cache)
    cache.truncate(6)
    cache.reorder(torch.tensor([1, 1]))
    story = torch.cat([x[[1, 1], :6], x[:, 8:10]], 1)
    torch.testing.assert_close(made(x[:, 8:10], cache=cache), made(story)[:, 6:])
    cache.reset()
    torch.testing.assert_close(made(x[:, :3], cache=cache), made(x[:, :3]))


@torch.no_grad()
def test_a_bias_of_distances_is_the_same_in_every_form():
    """One pass, with it as a bias of pairs, packed, and over a cache by a prompt and steps."""
    made, x = layer("ssmax", causal=True, window=(9, 0)), tokens(2, 22)
    table = torch.randn(1, HEADS, 1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    whole, given = made(x, relative_bias=table, relative_right=1), {"relative_right": 1}
    position = torch.arange(22)
    entry = position[:, None] - position + 1
    pairs = torch.where((entry >= 0) & (entry < 7), table[0, :, 0][:, entry.clamp(0, 6)], 0)
    torch.testing.assert_close(made(x, bias=pairs[None]), whole)
    assert not torch.allclose(made(x), whole)
    ends = torch.tensor([0, 22, 44], dtype=torch.int32)
    packed = made(x.flatten(0, 1), cu_seqlens=ends, max_seqlen=22, relative_bias=table[0], **given)
    torch.testing.assert_close(packed.view_as(whole), whole)
    cache, counts, steps = made.cache(2, 30), torch.tensor([18, 20]), []
    prompt = made(x[:, :20], cache=cache, counts=counts, relative_bias=table, **given)
    for b, count in enumerate(counts.tolist()):
        torch.testing.assert_close(prompt[b, :count], whole[b, :count])
    for at in range(2):
        new = torch.stack([x[b, count + at] for b, count in enumerate(counts.tolist())])[:, None]
        steps.append(made(new, cache=cache, relative_bias=table, **given))
    for b, count in enumerate(counts.tolist()):
        torch.testing.assert_close(torch.cat(steps, 1)[b], whole[b, count : count + 2])
    for refused in ({"cache": cache}, {"cu_seqlens": ends, "max_seqlen": 22}):
        refuses("ValueError: bias: expected None with", made, x, bias=pairs, **refused)
    refuses("TypeError: relative_right: expected an int", made, x, relative_right=torch.ones(2))


@torch.no_grad()
def test_a_scaling_with_a_relative_bias_over_a_cache():
    made, x = layer(Near(), causal=True), tokens(2, 20)
    cache, whole = made.cache(2, 30), made(x)
    steps = [made(part, cache=cache) for part in x.split([16, 1, 3], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    message = "NotImplementedError: scaling: expected one without a factor or bias of distances for a prompt"
    refuses(message, made, x, cache=made.cache(2, 30))
