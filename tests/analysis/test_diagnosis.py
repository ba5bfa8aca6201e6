"""`diagnose` against dense means over the rows and keys that count, and the power of ln n that gaps ask for."""

from dataclasses import fields

import pytest
import torch

from tests.support.masks import MASKS, visible_pairs
from tests.support.rows import HQ, B, dense, tensors
from tritonattn import SCALINGS
from tritonattn.analysis import Diagnosis, advise, diagnose
from tritonattn.analysis.gaps import described, layer_power, power_of

BY_GAPS = ("count_power", "count_power_error")


def expected(q, k, scaling="sqrt_dim", gain=None, **masks):
    rows = dense(q, k, scaling, gain, **masks)
    visible = visible_pairs((*q.shape[:3], k.shape[2]), **masks)
    group = q.shape[1] // k.shape[1]
    seen = visible.unflatten(1, (k.shape[1], group)).any(2).any(2)  # [B, Hkv, Sk]
    lengths = k.double().norm(dim=-1)
    multiplier = SCALINGS[scaling]().multiplier(q.double(), k.double().repeat_interleave(group, 1), visible)
    factor = (torch.as_tensor(multiplier).double() * (gain or 1.0)).broadcast_to(visible.shape)[..., 0]  # of rows
    found: dict[str, list] = {field.name: [] for field in fields(Diagnosis) if field.name not in BY_GAPS}
    for head in range(q.shape[1]):
        row = {name: value[:, head] for name, value in rows.items()}
        attends, several = row["key_count"] > 0, row["key_count"] > 1
        relative = row["entropy"][several] / row["key_count"][several].log()
        counts, norms = row["key_count"][attends], lengths[:, head // group][seen[:, head // group]]
        for name in ("logit_std", "max_probability", "jacobian_norm", "gradient_norm"):
            found[name].append(row[name][attends].mean())
        found["max_logit"].append(
            row["max_logit"][attends].max() if attends.any() else torch.tensor(-torch.inf).double()
        )
        found["relative_entropy"].append(relative.mean())
        found["near_one_hot"].append((row["max_probability"][attends] > 0.95).double().mean())
        found["near_uniform"].append((relative > 0.98).double().mean())
        p, n = row["max_probability"][several], row["key_count"][several]
        found["gap"].append(((n - 1) * p / (1 - p)).log().mean())
        largest = torch.where(seen[:, head // group], lengths[:, head // group], 0).amax(-1, keepdim=True)
        bound = factor[:, head] * q[:, head].double().norm(dim=-1) * largest  # [B, Sq]
        found["logit_bound"].append(bound[attends].mean())
        for name, x in (("key_count", counts), ("key_norm", norms)):
            found[f"{name}_mean"].append(x.mean())
            found[f"{name}_variation"].append(x.std(correction=0) / x.mean())
    return {name: torch.stack(values) for name, values in found.items()}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("scaling", "gain"), [("sqrt_dim", 3.0), ("key_norm_sum", None)])
def test_every_mask(mask, scaling, gain):
    q, k = tensors()
    masks = MASKS[mask](B, HQ, 6, 9)
    ours, exact = diagnose(q, k, scaling=scaling, gain=gain, **masks), expected(q, k, scaling, gain, **masks)
    for name, value in exact.items():
        assert getattr(ours, name).shape == (HQ,)
        torch.testing.assert_close(getattr(ours, name), value, rtol=1e-6, atol=1e-9, equal_nan=True)


def test_padding_counts_nowhere():
    """Padded keys are far longer than the rest, and would change every figure."""
    q, k = tensors()
    lengths = torch.tensor([0, 5])
    k[0], k[1, :, 5:] = 1e3, torch.nan
    ours, alone = diagnose(q, k, key_lengths=lengths), diagnose(q[1:], k[1:, :, :5])
    for field in fields(Diagnosis):
        values = getattr(ours, field.name), getattr(alone, field.name)
        torch.testing.assert_close(*values, rtol=1e-12, atol=0, equal_nan=field.name in BY_GAPS)
    assert (ours.key_count_mean == 5).all()
    assert (ours.key_count_variation == 0).all()


HEADS, LENGTH = 6, 512


def _standing_out(noise):
    """Every row's key of its number stands out."""
    noise.diagonal(dim1=-2, dim2=-1).fill_(6.0)
    return noise


LAWS = {
    "exponential tails": (0.0, lambda uniform, normal: -uniform.log()),
    "independent Gaussian": (0.5, lambda uniform, normal: normal),
    "a margin": (1.0, lambda uniform, normal: _standing_out(normal)),
    "crowded at a bound": (2.0, lambda uniform, normal: 1 / uniform.log()),
    "uniform": (None, lambda uniform, normal: uniform),  # which asks for n itself
}


def operands(law, length=LENGTH, heads=HEADS):
    """q and k whose products are logits of a law."""
    random = torch.Generator().manual_seed(0)
    shape = (1, heads, length, length)
    uniform = torch.rand(shape, generator=random, dtype=torch.float64).clamp(min=1e-12)
    normal = torch.randn(shape, generator=random, dtype=torch.float64)
    return LAWS[law][1](uniform, normal), torch.eye(length, dtype=torch.float64).expand(1, 1, -1, -1)


@pytest.mark.parametrize("law", LAWS)
def test_known_laws(law):
    """The present scaling may be any, negative factors included."""
    q, k = operands(law)
    found = diagnose(-q, k, causal=True, scaling="key_count", gain=-3.0)
    power, error = layer_power(found.count_power, found.count_power_error)
    wanted = LAWS[law][0]
    assert power_of(power, error) == wanted
    assert error < 0.12
    assert (power > 2.75) if wanted is None else abs(power - wanted) < 0.2


@pytest.mark.parametrize("mask", MASKS)
def test_powers_under_every_mask(mask):
    """Against b* of each row by its definition."""
    random = torch.Generator().manual_seed(0)
    sizes = (2, 2, 120, 130)
    q, k = (torch.randn(2, heads, length, 8, generator=random).double() for heads, length in ((2, 120), (1, 130)))
    masks = MASKS[mask](*sizes)
    found, visible = diagnose(q, k, **masks), visible_pairs(sizes, **masks)
    logits = (q @ k.repeat_interleave(2, 1).mT).masked_fill(~visible, -torch.inf).sort(descending=True).values
    competitors, count = torch.arange(130).double(), visible.sum(-1)
    slopes = competitors.log() / (logits[..., :1] - logits)
    critical, competitors = slopes.masked_fill((competitors < 4) | (competitors >= count[..., None]), -torch.inf).max(
        -1
    )
    for head in range(2):
        n, b, c = (x[:, head][count[:, head] >= 16].double() for x in (count, critical, competitors))
        if len(n) == 0 or n.max() < 8 * n.min():
            assert found.count_power[head].isnan()
            continue
        depth = ((c / 4).log() / ((n - 1) / 4).log()).mean()
        x = (n if depth > 0.5 else n / 3).log().log()
        slope = torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), b.log()[:, None]).solution[0, 0]
        assert float(found.count_power[head]) == pytest.approx(float(slope), abs=1e-9)


def test_where_it_cannot_know_it_says_so():
    q, k = operands("independent Gaussian", 64, heads=1)
    for few in (diagnose(q, k), diagnose(q, k, causal=True), diagnose(q[:, :, :0], k)):  # one n; 16 to 64; no row
        assert few.count_power.isnan().all()
        assert "not enough rows" in few.table()
    assert described(0.7, 0.1) == "unclear (0.70 +- 0.10)"
    assert described(0.6, 0.1) == "1/2 (0.60 +- 0.10)"
    assert power_of(*layer_power(torch.tensor([0.0, 2.0]), torch.tensor([0.01, 0.01]))) is None


@pytest.mark.parametrize(
    ("law", "mode"),
    [
        ("independent Gaussian", "log_power(0.5, {})"),
        ("a margin", "log_key_count({})"),
        ("exponential tails", "sqrt_dim"),
    ],
)
def test_the_advice_where_counts_vary(law, mode):
    q, k = operands(law)
    hi = torch.arange(1, LENGTH + 1).clamp(min=2)[None]  # one pair more than causal
    advice = advise(q * LENGTH**0.5, k, key_ranges=torch.stack([torch.zeros_like(hi), hi], -1))
    reading = advice.findings[0].reading
    assert advice.findings[0].rule.name == "varied counts"
    assert advice.mode == mode.format(round(reading.key_count_mean))
    assert reading.power == LAWS[law][0]
    assert advice.keeps == (mode == "sqrt_dim")
