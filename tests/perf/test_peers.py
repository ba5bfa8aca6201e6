"""Peers: recipes against the modes' formulas, adapters against stand-ins for packages that only GPUs run."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("triton")
import tritonattn
from perf import peers
from perf.attention_cases import Case
from perf.contest import Effort
from perf.recipes import rows_of
from perf.work import Shape
from tests.support.pairs import in_turn
from tritonattn.calls import dispatch, logits

from .commands import CPU, HERE, statuses

ONCE = Effort(1, 1.0, 0.0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scaling", [name for name in tritonattn.SCALINGS if name != "cosine"])
def test_recipes_follow_the_formulas(scaling, causal):
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 5, 8, generator=random), torch.randn(2, 2, 9, 8, generator=random)
    visible = torch.ones(1, 1, 5, 9, dtype=torch.bool).tril(4 if causal else 9)
    wanted = tritonattn.SCALINGS[scaling]().multiplier(q, k.repeat_interleave(2, 1), visible)
    torch.testing.assert_close(rows_of(scaling, q, k, causal)[..., None], wanted.float().expand(2, 4, 5, 1))


def flash_attn_func(q, k, v, softmax_scale, causal):
    """Takes [B, S, H, D], and returns lse too, as flash-attn 3 and 4 may."""
    out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=softmax_scale, is_causal=causal)
    return out.transpose(1, 2), None


def memory_efficient_attention(q, k, v, attn_bias, scale):
    return flash_attn_func(q, k, v, scale, attn_bias is not None)[0]


@pytest.fixture
def installed(monkeypatch):
    """Packages of the same functions, on this CPU."""
    functions = (flash_attn_func, memory_efficient_attention)
    for name in ("flash_attn", "flash_attn_interface", "flash_attn.cute", "xformers", "xformers.ops"):
        module = ModuleType(name)
        module.__dict__.update({function.__name__: function for function in functions}, LowerTriangularMask=object)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(peers, "require_gpu", lambda device: None)


@pytest.mark.parametrize("causal", [False, True])
def test_packages_of_gpus(causal, installed):
    names = ("flash-attn-2", "flash-attn-3", "flash-attn-4", "xformers")
    who = (("tritonattn", "dim"), *((name, scaling) for name in names for scaling in ("dim", "key_norm_mean")))
    case = Case("forward", Shape(1, 2, 2, 33, 33, 16, causal), "bf16", "forward+backward", who, CPU, "sdpa")
    records = case.contest().run(ONCE, HERE)
    assert statuses(records) == dict.fromkeys(statuses(records), ("measured", ""))
    assert len(records) == 9
    wide = replace(case, dtype="fp32").contest().run(ONCE, HERE)
    assert statuses(wide)["flash-attn-3 dim"] == ("skipped", "takes float16 and bfloat16, not float32")


@in_turn(scaling=["sqrt_dim", "key_norm_mean", "cosine"], dtype=["fp32", "bf16"])
def test_the_package_is_not_its_own_judge(monkeypatch, scaling, dtype):
    """Logits that are 3% off on every backend are found, and torch's own are not."""
    right = logits.scales_of, logits.dense

    def scales_of(*arguments):
        found = right[0](*arguments)
        return replace(found, constant=1.03 * found.constant)

    def dense(call):
        multiplier, bias = right[1](call)
        return 1.03 * multiplier, bias

    monkeypatch.setattr(logits, "scales_of", scales_of)
    monkeypatch.setattr(dispatch, "dense", dense)
    who = (("tritonattn", scaling), ("sdpa", "sqrt_dim"), ("eager", scaling))
    shape = Shape(1, 2, 2, 48, 48, 16, causal=True)
    for passes in ("forward", "backward"):
        case = Case(passes, shape, dtype, passes, who, CPU, "sdpa")
        found = {name: status for name, (status, _) in statuses(case.contest().run(ONCE, HERE)).items()}
        assert found.pop(f"tritonattn {scaling}") == "wrong"
        assert found.pop("sdpa sqrt_dim") == "measured"
        assert set(found.values()) <= {"measured", "skipped"}
