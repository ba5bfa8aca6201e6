"""Peers: recipes against the modes' formulas, adapters against stand-ins for packages that only GPUs run."""

from dataclasses import replace

import pytest
import torch

import tritonattn
from perf.cases.attention import Case
from perf.cases.contest import Effort
from perf.cases.recipes import has_recipe, rows_of
from perf.cases.work import Shape
from tests.support.pairs import in_turn
from tritonattn.calls import dispatch, formulas

from .commands import CPU, HERE, statuses

ONCE = Effort(1, 1.0, 0.0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scaling", [*filter(has_recipe, tritonattn.SCALINGS)])
def test_recipes_follow_the_formulas(scaling, causal):
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 5, 8, generator=random), torch.randn(2, 2, 9, 8, generator=random)
    visible = torch.ones(1, 1, 5, 9, dtype=torch.bool).tril(4 if causal else 9)
    wanted = tritonattn.SCALINGS[scaling]().multiplier(q, k.repeat_interleave(2, 1), visible)
    torch.testing.assert_close(rows_of(scaling, q, k, causal)[..., None], wanted.float().expand(2, 4, 5, 1))


@in_turn(scaling=["sqrt_dim", "key_norm_mean", "cosine"], dtype=["fp32", "bf16"])
def test_the_package_does_not_judge_itself(monkeypatch, scaling, dtype):
    """Logits that are 3% off on every backend are found, and those of torch are not."""
    right = dispatch.scales_of, formulas.dense

    def scales_of(*arguments):
        found = right[0](*arguments)
        return replace(found, constant=1.03 * found.constant)

    def dense(call):
        multiplier, bias = right[1](call)
        return 1.03 * multiplier, bias

    monkeypatch.setattr(dispatch, "scales_of", scales_of)
    monkeypatch.setattr(formulas, "dense", dense)
    who = (("tritonattn", scaling), ("sdpa", "sqrt_dim"), ("eager", scaling))
    shape = Shape(1, 2, 2, 48, 48, 16, causal=True)
    for passes in ("forward", "backward"):
        case = Case(passes, shape, dtype, passes, who, CPU, "sdpa")
        found = {name: status for name, (status, _) in statuses(case.contest().run(ONCE, HERE)).items()}
        assert found.pop(f"tritonattn {scaling}") == "wrong"
        assert found.pop("sdpa sqrt_dim") == "measured"
        assert set(found.values()) <= {"measured", "skipped"}
