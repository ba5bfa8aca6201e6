"""Starting points, parameters and refusals of each learned scaling."""

import math

import pytest
import torch

from tests.support.calls import operands
from tests.support.masks import MASKS
from tests.support.pairs import pairwise
from tests.support.refusals import refuses
from tritonattn import SCALINGS, Scales, Scaling, attention, nn
from tritonattn.core.statistics import Statistics
from tritonattn.core.visibility import Visibility
from tritonattn.scaling import Cosine, LogKeyCount, LogPower

POINTS = ["sqrt_dim", "dim", "none", "key_count", "sqrt_key_count", "key_norm_sum", "key_norm_mean"]


def factors(scaling, rows=6, dim=16, causal=True, seed=0):
    """The factor of q . k, [1, 4, rows] or with keys [1, 4, rows, rows], and the operands."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, 4, rows, dim, dtype=torch.float64, generator=generator)
    k = torch.randn(1, 2, rows, dim, dtype=torch.float64, generator=generator)
    visibility = Visibility.of(q, k, causal=causal)
    scales = scaling.scales(q, k, visibility, Statistics(k, visibility))
    factor = scales.constant * (1.0 if scales.query is None else scales.query)
    factor = torch.as_tensor(factor, dtype=torch.float64)
    if factor.dim() > 1 and factor.shape[-2] == 2:
        factor = factor.repeat_interleave(2, dim=-2)
    factor = factor.expand(1, 4, rows)
    return (factor if scales.key is None else factor[..., None] * scales.key.repeat_interleave(2, 1)[:, :, None]), q, k


def set_to(parameter, *values):
    parameter.data.copy_(torch.tensor(values, dtype=torch.float64))


def test_per_head_multiplies_by_exp():
    scaling = nn.PerHead("sqrt_key_count", heads=4).double()
    assert torch.equal(factors(scaling)[0], factors(SCALINGS["sqrt_key_count"]())[0])
    set_to(scaling.theta, 0.5, -1.0, 2.0, 0.0)
    for head, theta in enumerate((0.5, -1.0, 2.0, 0.0)):
        wanted = [math.exp(theta) / math.sqrt(n) for n in range(1, 7)]
        assert factors(scaling)[0][0, head].tolist() == pytest.approx(wanted, rel=1e-12)


def test_ssmax_is_s_ln_n_and_starts_at_log_key_count():
    scaling = nn.SSMax(4, bias=True).double()
    set_to(scaling.s, 0.5, 0.0, -1.0, 0.43)
    set_to(scaling.b, 0.0, 1.0, 0.25, 0.0)
    for head, (s, b) in enumerate(zip((0.5, 0.0, -1.0, 0.43), (0, 1, 0.25, 0), strict=True)):
        wanted = [(s * math.log(n) + b) / 4 for n in range(1, 7)]
        assert factors(scaling)[0][0, head].tolist() == pytest.approx(wanted, rel=1e-7)
    for base in (math.e, 512.0):
        torch.testing.assert_close(factors(nn.SSMax(4, base).double())[0], factors(LogKeyCount(base))[0])
    for base in (1.0, 0.0, math.inf, "e"):
        refuses("ValueError: base: expected a finite number above 1", nn.SSMax, 4, base)


def test_log_power_is_a_power_of_ln_n():
    scaling = nn.LearnedLogPower(4, base=8).double()
    set_to(scaling.p, 0.5, 1.0, -0.5, 3.0)
    factor, q, k = factors(scaling)
    for head, p in enumerate((0.5, 1.0, -0.5, 3.0)):
        wanted = [0.0] + [(math.log(n) / math.log(8)) ** p / 4 for n in range(2, 7)]
        assert factor[0, head].tolist() == pytest.approx(wanted, rel=1e-12)
    dense = scaling.multiplier(q, k, torch.ones(1, 1, 6, 6).bool().tril())
    torch.testing.assert_close(dense[..., 0], factor, rtol=1e-12, atol=0)


def test_log_power_starts_at_its_mode():
    for power, base in ((0.5, math.e), (1.0, 512.0), (2.0, 3.0)):
        fixed = factors(LogPower(power, base))[0]
        torch.testing.assert_close(factors(nn.LearnedLogPower(4, power, base).double())[0], fixed, rtol=1e-12, atol=0)
        if power == 1.0:
            torch.testing.assert_close(fixed, factors(LogKeyCount(base))[0], rtol=1e-12, atol=0)
    assert torch.equal(nn.LearnedLogPower(4).p, torch.full((4,), 0.5))


AT_SQRT_DIM = {
    "ssmax": lambda: nn.SSMax(4, mode="sqrt_dim"),
    "log_power": lambda: nn.LearnedLogPower(4, base=8, mode="sqrt_dim"),
    "query_adaptive_ssmax": lambda: nn.QueryAdaptiveSSMax(4, 8, mode="sqrt_dim"),
    "power_law": lambda: nn.PowerLaw(4, mode="sqrt_dim"),
    "per_head": lambda: nn.PerHead(mode="sqrt_dim", heads=4),
}


@pytest.mark.parametrize("name", AT_SQRT_DIM)
def test_a_start_at_sqrt_dim_is_that_mode_and_learns_at_once(name):
    """Also for a row of one key, whose probability is not 1 with a sink."""
    scaling, leaves = AT_SQRT_DIM[name](), operands(torch.float32, lengths=(7, 7))
    sinks, found = torch.linspace(-1, 1, 4), []
    for mode in (scaling, "sqrt_dim"):
        for backend in ("sdpa", "reference"):
            out = attention(*leaves.values(), scaling=mode, causal=True, sinks=sinks, backend=backend)
            found.append(out)
    for out in found[:3]:
        torch.testing.assert_close(out, found[3], rtol=1e-6, atol=1e-6)
    learned = [x for x in scaling.parameters() if x.requires_grad]
    for gradient in torch.autograd.grad(found[0].square().sum(), learned):
        assert gradient.ne(0).all()


def test_query_adaptive_ssmax_by_hand():
    scaling = nn.QueryAdaptiveSSMax(4, 16).double().requires_grad_(False)
    plain = [1 / 4] + [(1 + math.log(2) * math.log(n)) / 4 for n in range(2, 7)]
    assert factors(scaling)[0][0, 1].tolist() == pytest.approx(plain, rel=1e-12)
    torch.nn.init.normal_(scaling.w)
    set_to(scaling.delta, 0.5, 0.0, -1.0, 2.0)
    set_to(scaling.gamma, 0.5, 1.0, 2.0, -0.5)
    factor, q, k = factors(scaling)
    for head, row in ((0, 5), (1, 2), (2, 4), (3, 1)):
        weight = math.log1p(math.exp(float(scaling.w[head] @ q[0, head, row])))
        wanted = float(scaling.delta[head]) + weight * math.log(row + 1) ** float(scaling.gamma[head])
        assert float(factor[0, head, row]) == pytest.approx(wanted / 4, rel=1e-12)
    dense = scaling.multiplier(q, k, torch.ones(1, 1, 6, 6).bool().tril())
    torch.testing.assert_close(dense[..., 0], factor, rtol=1e-12, atol=0)


def test_query_adaptive_ssmax_ignores_rows_without_keys_and_knows_its_head_dim():
    """NaN in the q of such rows reaches no parameter."""
    scaling = nn.QueryAdaptiveSSMax(4, 16).double()
    q, k, v = torch.randn(3, 1, 4, 6, 16, dtype=torch.float64).unbind(0)
    q[:, :, 0] = math.nan
    attention(q, k[:, :, :5], v[:, :, :5], scaling=scaling, causal=True).sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in scaling.parameters())
    other = nn.QueryAdaptiveSSMax(4, 8)
    for call in (lambda: factors(other), lambda: other.multiplier(q, k, torch.ones(1, 1, 6, 6).bool())):
        refuses("ValueError: ~ expected q of QueryAdaptiveSSMax's head dim 8, got 16", call)


@pytest.mark.parametrize("tau", [None, 10.0])
def test_cosine_starts_at_its_tau(tau):
    scaling = nn.LearnedCosine(4, tau).double()
    torch.testing.assert_close(factors(scaling)[0], factors(Cosine(tau))[0], rtol=1e-14, atol=0)
    set_to(scaling.theta, 0.5, -1.0, 2.0, 0.0)
    factor, q, k = factors(scaling)
    logits = (q @ k.repeat_interleave(2, 1).mT) * factor
    cosine = torch.nn.functional.cosine_similarity(q[:, :, :, None], k.repeat_interleave(2, 1)[:, :, None], dim=-1)
    taus = (tau or 4.0) * torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64).exp()
    torch.testing.assert_close(logits, cosine * taus[:, None, None])


@pairwise(
    mode=POINTS, dtype=[torch.float64, torch.float32, torch.bfloat16], mask=["full", "causal window", "everything"]
)
def test_the_power_law_starts_exactly_at_its_mode(mode, dtype, mask):
    leaves, masks = operands(dtype), MASKS[mask](2, 4, 5, 7)
    ours, named = (attention(*leaves.values(), scaling=scaling, **masks) for scaling in (nn.PowerLaw(4, mode), mode))
    tight = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 0.0}[dtype]
    torch.testing.assert_close(ours, named, rtol=tight, atol=tight)
    if dtype != torch.bfloat16:  # there a scale per row and a constant are rounded into q at different steps
        gradients = [torch.autograd.grad(x.double().square().sum(), leaves.values()) for x in (ours, named)]
        torch.testing.assert_close(*gradients, rtol=10 * tight, atol=10 * tight)


def test_the_power_law_by_hand():
    scaling = nn.PowerLaw(4).double()
    set_to(scaling.theta, 0.1, 0.0, -0.5, 0.0)
    set_to(scaling.dim_exponent, 0.0, -0.5, 1.0, 0.0)
    set_to(scaling.count_exponent, 0.5, -1.0, 0.0, 0.25)
    set_to(scaling.length_exponent, -1.0, 0.5, 2.0, 0.0)
    learned = {name for name, x in scaling.named_parameters() if x.requires_grad}
    assert set(scaling.state_dict()) - learned == {"dim_exponent"}, "which waits to be asked for"
    factor, _, k = factors(scaling, causal=False)
    parameters = (scaling.theta, scaling.dim_exponent, scaling.count_exponent, scaling.length_exponent)
    for head in range(4):
        theta, a, b, c = (x[head].item() for x in parameters)
        rho = k[0, head // 2].norm(dim=-1).mean().item()
        wanted = math.exp(theta) * 16**a * 6**b * rho**c
        assert factor[0, head].tolist() == pytest.approx([wanted] * 6, rel=1e-12)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_the_power_law_of_tiny_keys_and_queries_in_float64(backend):
    """Factors near 1e60 act as they are."""
    scaling = nn.PowerLaw(4, "none")
    set_to(scaling.length_exponent, -2.0, -2.0, -2.0, -2.0)
    q, k, v = (x.detach() for x in operands(torch.float64).values())
    tiny, usual = (attention(q * by, k * by, v, scaling=scaling, backend=backend) for by in (1e-30, 1.0))
    torch.testing.assert_close(tiny, usual, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("blend", ["linear", "geometric"])
@pytest.mark.parametrize(
    ("start", "end"), [("sqrt_dim", "key_norm_sum"), ("log_key_count", "dim"), ("none", "key_count")]
)
def test_a_schedule_begins_and_ends_at_its_modes(start, end, blend):
    scaling = nn.Scheduled(start, end, steps=8, blend=blend)
    a, b = (factors(SCALINGS[mode]())[0] for mode in (start, end))
    torch.testing.assert_close(factors(scaling)[0], a, rtol=0, atol=0)
    for step in range(1, 11):
        scaling.advance()
        t = min(step / 8, 1)
        assert scaling.progress().item() == t
        wanted = (1 - t) * a + t * b if blend == "linear" else torch.where(a == 0, 1.0 * (t == 1), a ** (1 - t)) * b**t
        torch.testing.assert_close(factors(scaling)[0], wanted, rtol=1e-13, atol=0)
    torch.testing.assert_close(factors(scaling)[0], b, rtol=0, atol=0)


def test_a_mode_of_the_user_gets_statistics_in_float32_from_a_schedule():
    class Custom(Scaling):
        def scales(self, q, k, visibility, statistics):
            assert statistics.norm_sum.dtype == torch.float32
            return Scales(1.0, query=statistics.norm_sum.reciprocal())

    q, k, v = operands(torch.float32).values()
    schedule = nn.Scheduled(Custom(), "key_norm_sum", steps=10)
    wanted = attention(q, k, v, scaling="key_norm_sum")
    torch.testing.assert_close(attention(q, k, v, scaling=schedule), wanted, rtol=1e-5, atol=1e-6)
