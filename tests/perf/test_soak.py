"""A trial's check: it lets right results pass, and finds wrong ones, infinite ones and those that change."""

import itertools

import pytest
import torch

import tritonattn
from perf.soak.trial import Trial

Q_LEN, K_LEN = 9, 6


def _trial(spoil, dtype=torch.float32, **options) -> Trial:
    """Causal attention, with rows without keys, whose "triton" results are spoiled CPU ones."""
    random = torch.Generator().manual_seed(0)
    leaves = {name: torch.randn(1, 2, n, 8, generator=random).to(dtype) for name, n in (("q", Q_LEN), ("k", K_LEN))}
    leaves["v"] = leaves["k"].flip(-1)

    def attend(*, backend, **arguments):
        if backend == "reference":
            return tritonattn.attention(**arguments, backend="reference")
        return spoil(*tritonattn.attention(**arguments, backend="sdpa"))

    return Trial(0, "attention", dtype, leaves, {"causal": True, "return_aux": True, **options}, attend)


def test_right_results_pass():
    _trial(lambda out, aux: (out, aux)).check()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out, aux: (out + 1e-4, aux), "out: expected an error of at most"),
        (lambda out, aux: (out, aux._replace(lse=aux.lse + 1e-3)), "lse: expected"),
        (lambda out, aux: (out, aux._replace(entropy=aux.entropy + 1e-3)), "entropy: expected"),
        (lambda out, aux: (out, aux._replace(max_logit=aux.max_logit.clamp(min=-1e30))), "max_logit: expected -inf"),
        (lambda out, aux: (out.masked_fill(out == 0, torch.nan), aux), "out: expected finite values"),
        (lambda out, aux: (out + out.detach() * 1e-3 - out * 1e-3, aux), "gradient of q: expected an error"),
    ],
)
def test_wrong_results_do_not(spoil, message):
    with pytest.raises(AssertionError, match=message):
        _trial(spoil).check()


def test_results_that_change_do_not():
    calls = itertools.count()
    trial = _trial(lambda out, aux: (out * (1 + 2**-23 * (next(calls) % 2)), aux))
    with pytest.raises(AssertionError, match="out: a second run differs"):
        trial.check()
