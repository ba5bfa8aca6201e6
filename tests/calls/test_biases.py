"""Biases of keys, of pairs and of distances: the formula, -inf and NaN, modes that return one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tritonattn
from tests.support.calls import operands
from tests.support.masks import MASKS, visible_pairs
from tests.support.pairs import pairwise
from tritonattn import Scales, Scaling, attention, check_scaling
from tritonattn.scaling import Grok2

BACKENDS = ("sdpa", "reference")
B, HQ, HKV, SQ, SK = 2, 4, 2, 5, 7
SIZES = B, HQ, SQ, SK


def random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pairs_of(table: Tensor, right: int, q_len: int, k_len: int) -> Tensor:
    """relative[i, j], pair by pair, [..., Sq, Sk]; row i stands at i + Sk - Sq."""
    table, rows = table.expand(*table.shape[:-2], q_len, -1), []
    for i in range(q_len):
        entries = [i + k_len - q_len - j + right for j in range(k_len)]
        rows.append([table[..., i, t] if 0 <= t < table.shape[-1] else table[..., 0, 0] * 0 for t in entries])
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def formula(q, k, v, bias, hidden, softcap=None, after=False, sinks=None):
    """(out, lse, max_logit, entropy), written out, of rows that attend to a key."""
    k, v = (x.repeat_interleave(HQ // HKV, 1) for x in (k, v))
    logits, bias = q @ k.mT * q.shape[-1] ** -0.5, bias.masked_fill(hidden, 0)
    logits = logits if after else logits + bias
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    capped = (capped + bias if after else capped).masked_fill(hidden, -torch.inf)
    lse, weights = capped.logsumexp(-1), capped.softmax(-1)
    largest = (capped if after else logits.masked_fill(hidden, -torch.inf)).amax(-1)
    total = lse if sinks is None else torch.logaddexp(lse, sinks[:, None])
    return (capped - total[..., None]).exp() @ v, lse, largest, torch.special.entr(weights).sum(-1)


FORMS = {  # shapes of a bias of keys, of one of pairs, and of a table with its relative_right
    "every key": ((B, HQ, SK), None, None, 0),
    "keys of key heads": ((1, HKV, SK), None, None, 0),
    "keys of all heads": ((B, 1, SK), None, None, 0),
    "every pair": (None, (B, HQ, SQ, SK), None, 0),
    "a row": (None, (SQ, 1), None, 0),
    "pairs of heads": (None, (1, HQ, 1, SK), None, 0),
    "one": (None, (1,), None, 0),
    "a head": (None, None, (1, HQ, 1, 4), 0),
    "both sides": (None, None, (1, HQ, 1, SQ + SK - 1), SK - 1),
    "of rows": (None, None, (B, HQ, SQ, 3), 1),
    "extent of 1": (None, None, (B, 1, SQ, 1), 0),
    "longer than keys": (None, None, (1, 1, SQ, 20), 9),
    "all": ((B, HQ, SK), (B, 1, SQ, SK), (1, HQ, SQ, 5), 2),
}


@pairwise(
    form=FORMS,
    mask=["full", "causal", "window", "lengths", "ranges", "mask of heads", "everything"],
    softcap=[None, "before", "after"],
    sinks=[None, torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)],
    backend=BACKENDS,
)
def test_the_formula(form, mask, softcap, sinks, backend):
    of_keys, dense, table, right = FORMS[form]
    tensors, options = operands(), MASKS[mask](*SIZES) | {"relative_right": right, "backend": backend, "sinks": sinks}
    total, hidden = torch.zeros(SIZES, dtype=torch.float64), ~visible_pairs(SIZES, **MASKS[mask](*SIZES))
    if of_keys is not None:
        bias = tensors["key_bias"] = random(*of_keys).index_fill_(-1, torch.tensor([2]), -torch.inf).requires_grad_()
        total = total + bias.repeat_interleave(HQ // bias.shape[-2], -2)[..., None, :]
        hidden = hidden | (torch.arange(SK) == 2)
    if dense is not None:
        tensors["bias"] = random(*dense).requires_grad_()
        total = total + tensors["bias"]
    if table is not None:
        tensors["relative_bias"] = random(*table, seed=2).requires_grad_()
        total = total + pairs_of(tensors["relative_bias"], right, SQ, SK)
    cap = {} if softcap is None else {"softcap": 1.5}
    after = softcap == "after"
    out, aux = attention(**tensors, **options, **cap, bias_after_softcap=after, return_aux=True)
    attends = ~hidden.all(-1)
    q, k, v = (tensors[name] for name in "qkv")
    wanted = formula(q, k, v, total, hidden & attends[..., None], after=after, sinks=sinks, **cap)
    for ours, theirs, otherwise in zip((out, *aux), wanted, (0.0, -torch.inf, -torch.inf, 0.0), strict=True):
        torch.testing.assert_close(ours[attends], theirs[attends])
        assert (ours[~attends] == otherwise).all()
    weights = random(*out.shape, seed=3)
    found = torch.autograd.grad((out * weights).sum() + aux.lse[attends].sum(), tensors.values())
    expected = (wanted[0] * weights)[attends].sum() + wanted[1][attends].sum()
    for name, ours, theirs in zip(tensors, found, torch.autograd.grad(expected, tensors.values()), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("name", ["key_bias", "bias", "relative_bias"])
def test_gradients_over_heads_are_summed_before_they_are_rounded(name, backend):
    q, k, v = (random(1, 1, 16, 8, seed=seed).float().expand(-1, 64, -1, -1) for seed in range(3))
    bias = random(*(1, 1, 16) if name == "key_bias" else (1, 1, 16, 16)).bfloat16()
    weights = torch.tensor([1.0, -0.99]).repeat(32)[:, None, None]  # the heads' gradients cancel but for a hundredth

    def gradient(dtype: torch.dtype, backend: str) -> torch.Tensor:
        leaf = bias.to(dtype).requires_grad_()
        out = attention(q, k, v, **{name: leaf}, backend=backend)
        return torch.autograd.grad((out * weights).sum(), leaf)[0].float()

    exact, found = gradient(torch.float32, "reference"), gradient(torch.bfloat16, backend)
    assert (found - exact).abs().max() <= 2**-8 * exact.abs().max()


@pytest.mark.parametrize("name", ["key_bias", "bias"])
@pytest.mark.parametrize("softcap", [{}, {"softcap": 2.0}, {"softcap": 2.0, "bias_after_softcap": True}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_infinity_takes_all_weight(name, softcap, backend):
    """As a mask, but for what a scaling counts; a row of such keys is as one without keys."""
    tensors, rows = operands(), 1 if name == "key_bias" else SQ
    mask = random(B, HQ, rows, SK) > 0
    mask[0, 0] = False
    bias = torch.where(mask, 0.0, -torch.inf)
    hidden = {name: bias[:, :, 0] if name == "key_bias" else bias}
    options = {"sinks": torch.zeros(HQ), "return_aux": True, "backend": backend, **softcap}
    results = []
    for given in (hidden, {"mask": mask, "bias": torch.zeros(())}):
        out, aux = attention(**tensors, **given, **options)
        results.append((out, *aux, *torch.autograd.grad(out.square().sum(), tensors.values())))
    torch.testing.assert_close(*results)
    counted = attention(**tensors, scaling="key_count", **hidden, backend=backend)
    torch.testing.assert_close(counted, attention(**tensors, scaling=1 / SK, mask=mask, backend=backend))


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


@pytest.mark.parametrize("shape", [(B, HQ, SQ, SK), (1, HQ, 1, SK), (SQ, SK)])
def test_torchs_float_mask_is_a_bias(shape):
    q, k, v = (x.detach() for x in operands(heads=(HQ, HQ)).values())
    bias = random(*shape).requires_grad_()
    ours, theirs = attention(q, k, v, bias=bias), F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(ours, theirs)
    weights = random(*ours.shape)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), bias)[0] for x in (ours, theirs))
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
        alone = {**options, "relative_bias": table[b, None], "relative_right": 1, "batch_invariant": False}
        theirs = attention(
            q[b, None], k[b, None, :, :length], v[b, None, :, :length], causal=True, window=(5, 0), **alone
        )
        torch.testing.assert_close(ours[b, None], theirs)


def test_decoding_one_row_without_a_window_counts_from_the_last_key():
    lengths = torch.tensor([3, SK])
    q, k, v = (x.detach() for x in operands(lengths=(1, SK)).values())
    table = random(1, HQ, 1, 2)
    ours = tritonattn.attention_decode(q, k, v, key_lengths=lengths, relative_bias=table)
    short = attention(q[:1], k[:1, :, :3], v[:1, :, :3], relative_bias=table)
    torch.testing.assert_close(ours[:1], short)


class Recent(Scaling):
    """logit = q . k / sqrt(D) + slope_h j + ||k||: a bias of each key."""

    name = "recent"

    def slopes(self, k):
        return torch.arange(1, HQ + 1, dtype=k.dtype)[:, None] * torch.arange(k.shape[2], dtype=k.dtype)

    def scales(self, q, k, visibility, statistics):
        norms = statistics.norms.repeat_interleave(HQ // HKV, 1)
        return Scales(q.shape[-1] ** -0.5, key_bias=self.slopes(k) + norms)

    def multiplier(self, q, k, visible):
        return torch.tensor(q.shape[-1] ** -0.5)

    def addend(self, q, k, visible):
        return (self.slopes(k) + k.norm(dim=-1))[:, :, None]


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


class WrongRecent(Recent):
    def addend(self, q, k, visible):
        return super().addend(q, k, visible) * 1.01


class WrongDistant(Distant):
    def relative_addend(self, q, k, distance):
        return super().relative_addend(q, k, distance + 1)


CAPPED = {"causal": True, "scaling": Grok2(3, after_softcap=True), "softcap": 2.0}


def test_a_batch_invariant_row_is_as_alone():
    """Tiles of one shape, with a bias that they pad, and keys that are rolled to the first one of an entry."""
    tensors = {name: x.detach() for name, x in operands(torch.float32, lengths=(SK, SK)).items()}
    ranges = torch.tensor([[2, SK], [0, 5]])[:, None].expand(B, SK, 2)
    bias = random(1, HQ, SK, SK, dtype=torch.bfloat16).requires_grad_()
    for options in ({"key_ranges": ranges}, {"causal": True}, {"causal": True, "scaling": "scale_invariant"}, CAPPED):
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        out = attention(**leaves, bias=bias, batch_invariant=True, **options)
        exact = attention(**leaves, bias=bias, backend="reference", **options)
        torch.testing.assert_close(out, exact)
        for ours, theirs in zip(
            *(torch.autograd.grad(x.square().sum(), (*leaves.values(), bias)) for x in (out, exact)), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
        lone = {name: x[1:] for name, x in tensors.items()}
        of_one = {"key_ranges": ranges[1:]} if "key_ranges" in options else options
        assert torch.equal(out[1:], attention(**lone, bias=bias, batch_invariant=True, **of_one))


@pytest.mark.parametrize(
    ("mode", "wrong", "given"),
    [
        (Recent(), WrongRecent(), {"key_bias": random(B, HKV, SK)}),
        (Distant(), WrongDistant(), {"relative_bias": random(B, 1, SQ, 9)}),
        (Distant(), WrongDistant(), {"relative_bias": random(B, 1, SQ, 9), "relative_right": 5}),
    ],
)
def test_a_scaling_may_return_a_bias(mode, wrong, given):
    assert max(check_scaling(mode).values()) < 1e-6
    with pytest.raises(ValueError, match=r"mask 'full', .*addend\(\)"):
        check_scaling(wrong)
    tensors, scaling = operands(), tritonattn.nn.PerHead(mode, heads=HQ)
    ours, theirs = (attention(**tensors, scaling=scaling, **given, backend=backend) for backend in BACKENDS)
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, attention(**tensors, scaling=scaling))
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=f"mode_b: expected a mode without a bias .*, got {mode.name}"):
            attention(**tensors, scaling=tritonattn.nn.Scheduled("sqrt_dim", mode, steps=3), backend=backend)


class Wrong(Scaling):
    name = "wrong"

    def __init__(self, **fields):
        self.fields = fields

    def scales(self, q, k, visibility, statistics):
        return Scales(1.0, **self.fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"relative_bias": torch.zeros(1, 3, 1, 4)}, "relative_bias: expected a shape broadcastable"),
        ({"relative_right": 2}, "relative_right: expected 0 without relative and relative_bias, got int 2"),
        ({"relative_right": torch.ones(2)}, "relative_right: expected 0 without relative and .*, got a torch.float32"),
    ],
)
def test_tables_of_a_scaling_are_checked(fields, message):
    with pytest.raises(ValueError, match=r"wrong.scales\(\)." + message):
        attention(**operands(), scaling=Wrong(**fields))


def test_three_axes_of_one_entry_and_both_spellings():
    """A batch of as many entries as heads: what may be a mask a sequence or a mask a head is spelled out."""
    q, k, v = random(HQ, HQ, SQ, 8), random(HQ, HKV, SK, 8), random(HQ, HKV, SK, 8)
    pairs, keys = random(HQ, SQ, SK), random(HQ, SK)
    for name, x in (("mask", pairs > 0), ("bias", pairs)):
        for spelled, whole in ((x[:, None], x[:, None]), (x[None], x[None]), (x[:1], x[None, :1])):
            wanted = attention(q, k, v, **{name: whole.expand(HQ, HQ, SQ, SK)})
            torch.testing.assert_close(attention(q, k, v, **{name: spelled}), wanted)
    for x in (keys[:, None], keys[None]):
        wanted = attention(q, k, v, key_bias=x.expand(HQ, HQ, SK))
        torch.testing.assert_close(attention(q, k, v, key_bias=x), wanted)
    slopes = tritonattn.nn.ALiBi(HQ)(SK)  # of heads, as it says
    torch.testing.assert_close(attention(q, k, v, key_bias=slopes), attention(q, k, v, key_bias=slopes[None]))
