"""Biases of pairs, of every pair and of every distance: the formulas, -inf and NaN, who else computes the same."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tritonattn
from tests.support.calls import operands
from tests.support.masks import MASKS, visible_pairs
from tests.support.packed import Packed, packed_operands
from tests.support.pairs import pairwise
from tritonattn import Scales, Scaling, attention, check_scaling

BACKENDS = ("sdpa", "reference")
B, HQ, HKV, SQ, SK = SIZES = 2, 4, 2, 5, 7


def random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pairs_of(table: Tensor, right: int, q_len: int, k_len: int) -> Tensor:
    """relative[i, j], pair by pair, [..., Sq, Sk]; row i stands at i + Sk - Sq."""
    table, rows = table.expand(*table.shape[:-2], q_len, -1), []
    for i in range(q_len):
        entries = [i + k_len - q_len - j + right for j in range(k_len)]
        rows.append([table[..., i, t] if 0 <= t < table.shape[-1] else table[..., 0, 0] * 0 for t in entries])
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def formula(q, k, v, bias, visible, softcap=None, after=False):
    """(out, lse, max_logit, entropy), written out, of rows that see a key of finite bias."""
    k, v = (x.repeat_interleave(HQ // HKV, 1) for x in (k, v))
    logits, hidden = q @ k.mT * q.shape[-1] ** -0.5, ~visible | (bias == -torch.inf)
    bias = bias.masked_fill(hidden, 0)
    logits = logits if after else logits + bias
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    capped = (capped + bias if after else capped).masked_fill(hidden, -torch.inf)
    weights = capped.softmax(-1)
    largest = (capped if after else logits.masked_fill(hidden, -torch.inf)).amax(-1)
    return weights @ v, capped.logsumexp(-1), largest, torch.special.entr(weights).sum(-1)


FORMS = {  # shapes of a bias, and of a table with its relative_right
    "every pair": ((B, HQ, SQ, SK), None, 0),
    "a row": ((SQ, 1), None, 0),
    "keys of heads": ((HQ, 1, SK), None, 0),
    "one": ((1,), None, 0),
    "a head": (None, (1, HQ, 1, 4), 0),
    "both sides": (None, (1, HQ, 1, SQ + SK - 1), SK - 1),
    "of rows": (None, (B, HQ, SQ, 3), 1),
    "extent of 1": (None, (B, 1, SQ, 1), 0),
    "longer than keys": (None, (1, 1, SQ, 20), 9),
    "both": ((B, 1, SQ, SK), (1, HQ, SQ, 5), 2),
}


@pairwise(
    form=FORMS,
    mask=["full", "causal", "window", "lengths", "ranges", "mask of heads", "everything"],
    softcap=[None, "before", "after"],
    backend=BACKENDS,
)
def test_the_formula(form, mask, softcap, backend):
    dense, table, right = FORMS[form]
    tensors, arguments = operands(), MASKS[mask](B, HQ, SQ, SK) | {"relative_right": right, "backend": backend}
    total = torch.zeros(B, HQ, SQ, SK, dtype=torch.float64)
    if dense is not None:
        tensors["bias"] = random(*dense).requires_grad_()
        total = total + tensors["bias"]
    if table is not None:
        tensors["relative_bias"] = random(*table, seed=2).requires_grad_()
        total = total + pairs_of(tensors["relative_bias"], right, SQ, SK)
    if softcap is not None:
        arguments |= {"softcap": 1.5, "bias_after_softcap": softcap == "after"}
    out, aux = attention(**tensors, **arguments, return_aux=True)
    visible = visible_pairs((B, HQ, SQ, SK), **MASKS[mask](B, HQ, SQ, SK))
    sees = visible.any(-1).expand(B, HQ, SQ)
    q, k, v = (tensors[name] for name in "qkv")
    cap = {} if softcap is None else {"softcap": 1.5, "after": softcap == "after"}
    wanted = formula(q, k, v, total, visible | ~sees[..., None], **cap)
    for ours, theirs in zip((out, *aux), wanted, strict=True):
        torch.testing.assert_close(ours[sees], theirs[sees])
    weights = random(*out.shape, seed=3)
    found = torch.autograd.grad((out * weights).sum() + aux.lse[sees].sum(), tensors.values())
    expected = torch.autograd.grad((wanted[0] * weights)[sees].sum() + wanted[1][sees].sum(), tensors.values())
    for name, ours, theirs in zip(tensors, found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("after", [False, True])
def test_gradcheck(backend, after):
    tensors = {"bias": random(1, HQ, SQ, 1).requires_grad_(), "relative_bias": random(1, HQ, 1, 4).requires_grad_()}

    def function(*leaves):
        named = dict(zip(tensors, leaves, strict=True))
        options = {"softcap": 1.5, "bias_after_softcap": after, "relative_right": 1, "causal": True}
        out, aux = attention(**operands(), **named, **options, return_aux=True, backend=backend)
        return out, aux.lse

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize("softcap", [{}, {"softcap": 2.0}, {"softcap": 2.0, "bias_after_softcap": True}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_infinity_is_a_mask(softcap, backend):
    mask = random(B, HQ, SQ, SK) > 0
    mask[0, 0, 1] = False
    options = {"sinks": torch.zeros(HQ), "return_aux": True, "backend": backend, **softcap}
    (ours, aux), (theirs, masked) = (
        attention(**operands(), **hidden, **options)
        for hidden in ({"bias": torch.where(mask, 0.0, -torch.inf)}, {"mask": mask, "bias": torch.zeros(())})
    )
    for one, other in zip((ours, *aux), (theirs, *masked), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_bias_the_largest_logit_is_before_the_softcap(backend):
    plain, after = (
        attention(**operands(), softcap=0.1, bias_after_softcap=after, return_aux=True, backend=backend)[1]
        for after in (False, True)
    )
    torch.testing.assert_close(plain, after)
    assert after.max_logit.max() > 0.1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_value_of_an_invisible_pair_is_not_read_and_one_of_a_visible_pair_reaches_its_row(value, backend, softcap):
    causal = torch.ones(SK, SK).tril().bool()
    tensors, bias = operands(lengths=(SK, SK)), random(B, HQ, SK, SK)
    table = random(B, HQ, SK, 2 * SK - 1, seed=2)
    options = {"causal": True, "softcap": softcap, "relative_right": SK - 1, "backend": backend}

    def results(bias, table):
        leaves = [*tensors.values(), bias.requires_grad_(), table.requires_grad_()]
        out = attention(*leaves[:3], bias=leaves[3], relative_bias=leaves[4], **options)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    clean = results(bias.clone(), table.clone())
    later = table.clone()
    later[..., : SK - 1] = value
    for ours, theirs in zip(results(bias.masked_fill(~causal, value), later), clean, strict=True):
        assert torch.equal(ours, theirs)
    if value == torch.inf and softcap is not None:  # which caps it
        return
    bias = bias.clone()
    bias[0, 1, 3, 2] = value
    out = results(bias, table.clone())[0]
    assert out[0, 1, 3].isnan().all()
    out[0, 1, 3] = clean[0][0, 1, 3]
    torch.testing.assert_close(out, clean[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_keeps_its_dtype_and_its_gradient_is_rounded_once(dtype, backend):
    tensors = {name: x.detach().float() for name, x in operands().items()}
    bias, table = random(1, HQ, 1, SK, dtype=dtype), random(1, HQ, 1, 6, seed=2, dtype=dtype)

    def gradients(*leaves):
        leaves = [x.requires_grad_() for x in leaves]
        out = attention(**tensors, bias=leaves[0], relative_bias=leaves[1], relative_right=2, backend=backend)
        return torch.autograd.grad(out.square().sum(), leaves)

    for ours, exact in zip(gradients(bias, table), gradients(bias.float(), table.float()), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, exact.to(dtype), rtol=1e-6 if dtype == torch.float64 else 0, atol=1e-7)


def test_autocast_leaves_a_bias_alone():
    tensors = {name: x.detach().float() for name, x in operands().items()}
    bias = random(B, HQ, SQ, SK, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = attention(**tensors, bias=bias)
    assert ours.dtype == torch.bfloat16
    halves = {name: x.bfloat16() for name, x in tensors.items()}
    assert torch.equal(ours, attention(**halves, bias=bias))


@pytest.mark.parametrize("shape", [(B, HQ, SQ, SK), (1, HQ, 1, SK), (SQ, SK)])
def test_torchs_float_mask_is_a_bias(shape):
    q, k, v = (x.detach() for x in operands(heads=(HQ, HQ)).values())
    bias = random(*shape).requires_grad_()
    ours, theirs = attention(q, k, v, bias=bias), F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(ours, theirs)
    weights = random(*ours.shape)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), bias)[0] for x in (ours, theirs))
    torch.testing.assert_close(ours, theirs)


def test_a_score_mod_of_flex_attention_is_a_relative_bias():
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (x.detach().float() for x in operands(heads=(HQ, HQ), lengths=(SK, SK), dims=(8, 8)).values())
    table = random(HQ, 2 * SK - 1, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs uncompiled
        theirs = flex_attention(q, k, v, lambda score, b, h, i, j: score + table[h, i - j + SK - 1])
    ours = attention(q, k, v, relative_bias=table[None, :, None], relative_right=SK - 1)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [False, True])
def test_a_packed_sequence_is_as_alone(backend, rows):
    packed, right = Packed((4, 1, 3), (5, 2, 3)), 2
    tensors = packed_operands(packed)
    table = random(HQ, sum(packed.q_lengths) if rows else 1, 6).requires_grad_()
    options = {"causal": True, "window": (3, 0), "relative_right": right, "backend": backend}
    out = tritonattn.attention_varlen(**tensors, relative_bias=table, **packed.arguments(), **options)
    alone, row, key = [], 0, 0
    for q_len, k_len in zip(packed.q_lengths, packed.k_lengths, strict=True):
        q, k, v = (
            tensors[name][at : at + length].transpose(0, 1)[None]
            for name, at, length in (("q", row, q_len), ("k", key, k_len), ("v", key, k_len))
        )
        own = table[None, :, row : row + q_len] if rows else table[None]
        alone.append(attention(q, k, v, relative_bias=own, **options)[0].transpose(0, 1))
        row, key = row + q_len, key + k_len
    alone = torch.cat(alone)
    torch.testing.assert_close(out, alone)
    leaves = (*tensors.values(), table)
    for ours, theirs in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (out, alone)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("invariant", [False, True])
def test_decoding_is_the_end_of_a_full_pass(backend, new, invariant):
    if invariant and backend == "reference":
        pytest.skip("refused")
    lengths = torch.tensor([5, SK])
    q, k, v = (x.detach() for x in operands(lengths=(new, SK)).values())
    table = random(B, HQ, new, 4)
    options = {"relative_bias": table, "backend": backend, "batch_invariant": invariant}
    ours = tritonattn.attention_decode(q, k, v, key_lengths=lengths, window=(5, 0), relative_right=1, **options)
    for b, length in enumerate(lengths.tolist()):
        own = {**options, "relative_bias": table[b, None], "relative_right": 1, "batch_invariant": False}
        theirs = attention(
            q[b, None], k[b, None, :, :length], v[b, None, :, :length], causal=True, window=(5, 0), **own
        )
        torch.testing.assert_close(ours[b, None], theirs)


def test_decoding_one_row_without_a_window_counts_from_the_last_key():
    lengths = torch.tensor([3, SK])
    q, k, v = (x.detach() for x in operands(lengths=(1, SK)).values())
    table = random(1, HQ, 1, 2)
    ours = tritonattn.attention_decode(q, k, v, key_lengths=lengths, relative_bias=table)
    short = attention(q[:1], k[:1, :, :3], v[:1, :, :3], relative_bias=table)
    torch.testing.assert_close(ours[:1], short)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"bias": torch.zeros(3, SK)},
            ValueError,
            r"bias: expected a shape broadcastable to \[B, Hq, Sq, Sk\] .* got \[3, 7\]",
        ),
        (
            {"bias": torch.zeros(SQ, SK).int()},
            TypeError,
            "bias: expected float16, bfloat16, float32 or float64, got torch.int32",
        ),
        ({"relative_bias": torch.zeros(HQ, 3)}, ValueError, r"relative_bias: expected \[B, Hq, Sq, extent\]"),
        ({"relative_bias": torch.zeros(1, 3, 1, 3)}, ValueError, "relative_bias: expected a shape broadcastable"),
        ({"relative_bias": torch.zeros(1, 1, 1, 0)}, ValueError, "relative_bias: expected an extent of at least 1"),
        ({"relative_bias": [1.0]}, TypeError, r"relative_bias: expected a tensor \[B, Hq, Sq, extent\], got list"),
        ({"relative_right": 1}, ValueError, "relative_right: expected 0 without relative_bias, got 1"),
        (
            {"relative_bias": torch.zeros(1, 1, 1, 3), "relative_right": 3},
            ValueError,
            "relative_right: expected less than the extent, 3, got 3",
        ),
        (
            {"relative_bias": torch.zeros(1, 1, 1, 3), "relative_right": 1.0},
            TypeError,
            "relative_right: expected an int",
        ),
        ({"bias_after_softcap": 1}, TypeError, "bias_after_softcap: expected a bool"),
        (
            {
                "relative_bias": torch.zeros(1, 1, 1, 3),
                "key_ranges": torch.zeros(B, SQ, 2).int(),
                "batch_invariant": True,
            },
            NotImplementedError,
            "relative_bias: not supported with key_ranges under batch_invariant",
        ),
    ],
    ids=str,
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        attention(**operands(torch.float32), **arguments)


@pytest.mark.parametrize("lengths", [(0, SK), (SQ, 0)])
def test_nothing_to_attend_to(lengths):
    tensors = operands(lengths=lengths)
    leaves = [random(1, HQ, 1, lengths[1]).requires_grad_(), random(1, HQ, 1, 3).requires_grad_()]
    out = attention(**tensors, bias=leaves[0], relative_bias=leaves[1])
    assert all(x.count_nonzero() == 0 for x in (out, *torch.autograd.grad(out.sum(), leaves)))


def test_a_batch_invariant_row_is_as_alone():
    """Tiles of one shape, with a bias that they pad, and keys that are rolled to the first one of an entry."""
    tensors = {name: x.detach() for name, x in operands(torch.float32, lengths=(SK, SK)).items()}
    ranges = torch.tensor([[2, SK], [0, 5]])[:, None].expand(B, SK, 2)
    bias = random(1, HQ, SK, SK, dtype=torch.bfloat16).requires_grad_()
    for options in ({"key_ranges": ranges}, {"causal": True}):
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        out = attention(**leaves, bias=bias, batch_invariant=True, **options)
        exact = attention(**leaves, bias=bias, backend="reference", **options)
        torch.testing.assert_close(out, exact)
        for ours, theirs in zip(
            *(torch.autograd.grad(x.square().sum(), (*leaves.values(), bias)) for x in (out, exact)), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
        lone = {name: x[1:] for name, x in tensors.items()}
        own = {"key_ranges": ranges[1:]} if "key_ranges" in options else options
        assert torch.equal(out[1:], attention(**lone, bias=bias, batch_invariant=True, **own))


class Distant(Scaling):
    """logit = q . k / sqrt(D) - slope_h |t| + 1 / (1 + ||q||) for t from -2 to 3: a bias of each distance."""

    name = "distant"

    def slopes(self, q):
        return torch.arange(1, HQ + 1, dtype=q.dtype)[:, None, None]

    def scales(self, q, k, visibility, statistics):
        table = -self.slopes(q) * torch.arange(-2, 4, dtype=q.dtype).abs()  # [Hq, 1, 6]
        table = table + 1 / (1 + statistics.query_norms(q)[..., None])
        return Scales(q.shape[-1] ** -0.5, relative_bias=table, relative_right=2)

    def multiplier(self, q, k, visible):
        return torch.tensor(q.shape[-1] ** -0.5)

    def relative_addend(self, q, k, distance):
        bias = 1 / (1 + q.norm(dim=-1, keepdim=True)) - self.slopes(q) * distance.abs()
        return torch.where((distance >= -2) & (distance < 4), bias, 0)


class Wrong(Distant):
    def relative_addend(self, q, k, distance):
        return super().relative_addend(q, k, distance + 1)


def test_a_scaling_may_return_a_relative_bias():
    assert max(check_scaling(Distant()).values()) < 1e-6
    with pytest.raises(ValueError, match=r"mask 'full', .*addend\(\)"):
        check_scaling(Wrong())
    tensors, table = operands(), random(B, 1, SQ, 9)
    scaling = tritonattn.nn.PerHead(Distant(), heads=HQ)
    for right in (0, 5):
        ours, theirs = (
            attention(**tensors, scaling=scaling, relative_bias=table, relative_right=right, backend=backend)
            for backend in BACKENDS
        )
        torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, attention(**tensors, scaling=scaling))
    with pytest.raises(ValueError, match="mode_b: expected modes without a bias"):
        attention(**tensors, scaling=tritonattn.nn.Scheduled("sqrt_dim", Distant(), steps=3))


class OfWrongShape(Distant):
    def scales(self, q, k, visibility, statistics):
        return Scales(1.0, relative_bias=torch.zeros(1, 3, 1, 4))


def test_a_scaling_s_relative_bias_is_checked():
    with pytest.raises(ValueError, match=r"distant.scales\(\).relative_bias: expected a shape broadcastable"):
        attention(**operands(), scaling=OfWrongShape())
