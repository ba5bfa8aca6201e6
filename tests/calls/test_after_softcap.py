"""A factor behind the softcap: Grok 2's temperature multiplies the capped logit, on every backend but `flash`."""

import math
from typing import Any

import pytest
import torch

from tritonattn import Scales, Scaling, attention, attention_decode, attention_varlen
from tritonattn.analysis import diagnose
from tritonattn.core.call import Request
from tritonattn.core.terms import Terms
from tritonattn.core.visibility import Visibility
from tritonattn.distributed.sequence import check_over_ranks
from tritonattn.scaling import Grok2

LENGTH, CAP, SK = 5, 2.0, 24
OPTIONS: dict[str, Any] = {"scaling": Grok2(LENGTH, after_softcap=True), "softcap": CAP}


def operands(requires_grad: bool = True) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    return tuple(
        (torch.randn(2, heads, SK, 8, generator=random) * size).requires_grad_(requires_grad)
        for heads, size in ((4, 4.0), (2, 1.0), (2, 1.0))
    )


def written_out(q, k, v, gain: Any = 1.0, bias: Any = 0.0):
    """out and lse by the formula of SGLang's kernel: logits are capped, then multiplied; in float64, causal."""
    k, v = (x.double().repeat_interleave(2, 1) for x in (k, v))
    temperature = [math.log2(i) / math.log2(LENGTH) if i > LENGTH else 1.0 for i in range(SK)]
    capped = CAP * torch.tanh(gain * (q.double() @ k.mT) / 8**0.5 / CAP)
    logit = capped * torch.tensor(temperature, dtype=torch.float64)[:, None] + bias
    logit = logit.masked_fill(torch.ones(SK, SK).triu(1).bool(), -torch.inf)
    return logit.softmax(-1) @ v, logit.logsumexp(-1)


@pytest.mark.parametrize("more", [{}, {"gain": 1.5}, {"bias_after_softcap": True}], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_the_formula_and_its_gradients(backend, more):
    q, k, v = operands()
    bias = torch.randn(1, 4, SK, SK) if "bias_after_softcap" in more else None
    expected = written_out(q, k, v, more.get("gain", 1.0), 0.0 if bias is None else bias)
    out, aux = attention(q, k, v, **OPTIONS, **more, bias=bias, causal=True, backend=backend, return_aux=True)
    weights = torch.randn(out.shape), torch.randn(aux.lse.shape)
    for found, wanted in (
        ((out, aux.lse), expected),
        (torch.autograd.grad((out, aux.lse), (q, k, v), weights), torch.autograd.grad(expected, (q, k, v), weights)),
    ):
        for x, y in zip(found, wanted, strict=True):
            torch.testing.assert_close(x.double(), y.double(), rtol=1e-5, atol=1e-5)
    assert float(aux.max_logit.detach().amax()) > 2 * CAP  # before the cap


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@torch.no_grad()
def test_steps_and_packed_prompts_have_the_formula_of_the_batch(backend):
    q, k, v = operands(False)
    expected, _ = written_out(q, k, v)
    lengths = torch.tensor([SK - 7, SK])
    rows = torch.stack([q[0, :, SK - 8], q[1, :, SK - 1]])[:, :, None]
    step = attention_decode(rows, k, v, key_lengths=lengths, **OPTIONS, backend=backend)
    wanted = torch.stack([expected[0, :, SK - 8], expected[1, :, SK - 1]])[:, :, None]
    torch.testing.assert_close(step.double(), wanted, rtol=1e-5, atol=1e-5)
    ends = torch.tensor([0, SK, 2 * SK], dtype=torch.int32)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    out = attention_varlen(q, k, v, ends, ends, SK, SK, **OPTIONS, causal=True, backend=backend)
    torch.testing.assert_close(out.double(), expected.transpose(1, 2).flatten(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@torch.no_grad()
def test_rows_that_attend_to_all_keys_have_one_cap(backend):
    q, k, v = (x[:, :, -1:] if x.shape[1] == 4 else x for x in operands(False))
    whole = operands(False)
    expected, _ = written_out(whole[0], whole[1], whole[2])
    out = attention(q, k, v, **OPTIONS, backend=backend)
    torch.testing.assert_close(out.double(), expected[:, :, -1:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_bounds_of_the_logits_grow_with_the_factor():
    q, k, _ = operands(False)
    found = diagnose(1e3 * q, k, **OPTIONS, causal=True)
    assert float(found.logit_bound.max()) == pytest.approx(
        CAP * sum(max(1.0, math.log(max(i, 1)) / math.log(LENGTH)) for i in range(SK)) / SK, rel=1e-5
    )


class Learned(Scaling):
    after_softcap = True

    def __init__(self, t):
        self.t = t

    def scales(self, q, k, visibility, statistics):
        return Scales(q.shape[-1] ** -0.5, query=self.t)

    def multiplier(self, q, k, visible):
        return self.t * q.shape[-1] ** -0.5


def test_a_factor_of_zero_gives_means_of_values_and_no_nan():
    q, k, v = operands()
    out = attention(q, k, v, softcap=CAP, scaling=Learned(torch.zeros(4, 1)), causal=True, backend="sdpa")
    torch.testing.assert_close(out, (v.cumsum(2) / torch.arange(1, SK + 1)[:, None]).repeat_interleave(2, 1))
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.square().sum(), (q, k, v)))


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_what_it_lacks_is_refused_by_name(backend):
    q, k, v = operands(False)
    options: dict[str, Any] = {**OPTIONS, "causal": True, "backend": backend}
    with pytest.raises(NotImplementedError, match="gain: expected a number beside softcap and grok2, got a tensor"):
        attention(q, k, v, **options, gain=torch.ones(4, 1))
    request = Request(q, k, v, Visibility.of(q, k, causal=True), Terms(softcap=CAP), OPTIONS["scaling"])
    with pytest.raises(NotImplementedError, match="softcap: not supported over ranks with a scaling that acts behind"):
        check_over_ranks(request)
    learned: dict[str, Any] = {**options, "scaling": Learned(torch.ones(4, 1, requires_grad=True))}
    if backend == "sdpa":
        with pytest.raises(NotImplementedError, match="scaling: expected a Learned whose query needs no gradient"):
            attention(q, k, v, **learned)
        out = attention(q.requires_grad_(), k, v, **options)
        refusal = 'softcap under a scaling that acts behind it: .*jvp.* gradients of gradients; backend="reference" has'
        with pytest.raises(NotImplementedError, match=refusal):
            torch.autograd.grad(torch.autograd.grad(out.sum(), q, create_graph=True)[0].sum(), q)
