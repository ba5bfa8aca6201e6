"""The rules of `advise`: which one a reading falls under, and when a mode is a remedy."""

import math
from dataclasses import replace

import pytest

from tritonattn.analysis import RULES
from tritonattn.analysis.rules import Reading

POSITIONS, OPEN, BARE = "positions first", "without positions", "without QK-norm"
SMALL = ("near_one_hot", "near_uniform", "jacobian_norm", "gradient_norm", "key_count_variation")
SMALL += ("key_norm_variation", "key_norm_between")
HEALTHY = Reading(
    **{"layer": "a", "mode": "sqrt_dim", "logit_std": 1.0, "max_logit": 10.0, "relative_entropy": 0.8},
    **{"key_count_mean": 64.4, "key_norm_mean": 5.0, "causal": False, "longest": 64, "context": 64},
    **dict.fromkeys(SMALL, 0.1),
)
LONG = {"rotary": False, "causal": True, "bounded": "QK-norm"}


@pytest.mark.parametrize(
    ("rule", "fine", "beyond"),
    [
        ("broken", {"max_logit": 10.0}, {"max_logit": math.nan}),
        ("broken", {"max_logit": 10.0}, {"max_logit": math.inf}),
        ("few keys", {"key_count_mean": 2.0}, {"key_count_mean": 1.9, "near_one_hot": 0.9}),
        ("peaked", {"max_logit": 100.0}, {"max_logit": 100.1}),
        ("peaked", {"near_one_hot": 0.5}, {"near_one_hot": 0.51}),
        ("uniform", {"near_uniform": 0.5}, {"near_uniform": 0.51}),
        ("beyond the context", {"longest": 64}, {"longest": 65}),
        ("beyond the context", {"longest": 65, "context": None}, {"longest": 65}),
        ("beyond the context", {"longest": 65, "rotary": True, "windowed": True}, {"longest": 65}),
        ("beyond the context", {"longest": 65, "constant": False}, {"longest": 65}),
        ("varied norms", {"key_norm_between": 0.5}, {"key_norm_between": 0.51}),
        ("varied counts", {"key_count_variation": 0.25}, {"key_count_variation": 0.26}),
        ("varied counts", {"key_count_variation": 0.26, "causal": True}, {"key_count_variation": 0.26}),
        ("will fade", {"gap": 6.0}, {"gap": 6.0, "bounded": "QK-norm"}),
        ("will fade", {"gap": 4.1, "bounded": "QK-norm"}, {"gap": 4.2, "bounded": "QK-norm"}),  # ln 63 = 4.14
        ("will fade", {"gap": 6.0, "bounded": "QK-norm", "windowed": True}, {"gap": 6.0, "bounded": "QK-norm"}),
        ("will fade", {"gap": 6.0, "bounded": "QK-norm", "constant": False}, {"gap": 6.0, "bounded": "QK-norm"}),
        ("will fade", {"gap": 8.4, "bounded": "QK-norm"}, {"gap": 8.3, "bounded": "QK-norm"}),  # ln 4095 = 8.32
        (POSITIONS, {"rotary": True, "windowed": True}, {"rotary": True, "longest": 65}),
        (POSITIONS, {"rotary": True, "windowed": True}, {"rotary": True, "gap": 6.0, "bounded": "QK-norm"}),
        (OPEN, {**LONG, "windowed": True}, LONG),
        (OPEN, {**LONG, "causal": False}, LONG),
        (OPEN, {**LONG, "constant": False}, LONG),
        (BARE, {"rotary": None, "causal": True}, {"rotary": False, "causal": True}),
    ],
)
def test_a_rule_applies_beyond_its_limit_alone(rule, fine, beyond):
    for changed, name in ((fine, "healthy"), (beyond, rule)):
        one = replace(HEALTHY, **changed)
        assert next(rule.name for rule in RULES if rule.applies(one)) == name


def test_a_mode_fixes_down_to_a_quarter_of_ill_rows():
    peaked = next(rule for rule in RULES if rule.name == "peaked")
    for one_hot, logit, fixes in (
        (0.15, 100.0, True),
        (0.16, 100.0, False),
        (0.15, 100.1, False),
        (0, -math.inf, False),
    ):
        new = replace(HEALTHY, near_one_hot=one_hot, max_logit=logit)
        assert peaked.fixes(HEALTHY, new) == fixes, (one_hot, logit)
    modes = {None: "log_key_count(64)", 0.0: "sqrt_dim", 1.0: "log_key_count(64)", 2.0: "log_power(2, 64)"}
    assert {power: replace(HEALTHY, power=power).counted for power in modes} == modes
