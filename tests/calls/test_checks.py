"""Every refusal names the argument, what was expected and what came, and nothing is computed before it."""

import warnings

import pytest
import torch

import tritonattn
from tritonattn import ops
from tritonattn.backends import reference
from tritonattn.backends.cpu import sdpa
from tritonattn.scaling import KeyNormSum

B, HQ, HKV, SQ, SK, D = 2, 4, 2, 3, 5, 8


@pytest.fixture(autouse=True)
def _nothing_is_computed(monkeypatch):
    def computed(*args, **kwargs):
        pytest.fail("a refused call was computed")

    for module in (ops, sdpa, reference):
        monkeypatch.setattr(module, "attention", computed)


def operands(**overrides):
    named = {"q": torch.randn(B, HQ, SQ, D), "k": torch.randn(B, HKV, SK, D), "v": torch.randn(B, HKV, SK, D)}
    return named | overrides


def key_heads(count: int) -> dict:
    return dict.fromkeys("kv", torch.randn(B, count, SK, D))


with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # that these are a prototype
    NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])

OPERANDS = {
    "no tensor": ({"q": [[1.0]]}, TypeError, ("q:", "tensor [B, Hq, Sq, D]", "list")),
    "rank of q": ({"q": torch.randn(HQ, SQ, D)}, ValueError, ("q:", "4 axes", "[4, 3, 8]")),
    "rank of v": ({"v": torch.randn(1, B, HKV, SK, D)}, ValueError, ("v:", "4 axes", "5")),
    "integers": ({"k": torch.ones(B, HKV, SK, D).int()}, TypeError, ("k:", "float32", "torch.int32")),
    "complex": ({"q": torch.ones(B, HQ, SQ, D, dtype=torch.cfloat)}, TypeError, ("q:", "complex64")),
    "mixed dtypes": ({"v": torch.randn(B, HKV, SK, D).half()}, TypeError, ("q, k, v:", "one dtype", "torch.float16")),
    "nested": ({"v": NESTED}, TypeError, ("v:", "dense tensor [B, Hkv, Sk, Dv]", "nested tensor")),
    "sparse": ({"q": torch.ones(B, HQ, SQ, D).to_sparse()}, TypeError, ("q:", "dense", "sparse")),
    "devices": ({"k": torch.empty(B, HKV, SK, D, device="meta")}, ValueError, ("one device", "cpu, meta, cpu")),
    "batch": ({"k": torch.randn(3, HKV, SK, D)}, ValueError, ("batch size 2", "3 in k")),
    "heads of v": ({"v": torch.randn(B, 1, SK, D)}, ValueError, ("v:", "2 heads", "1")),
    "heads that do not divide": (key_heads(3), ValueError, ("k:", "divides q's 4", "3")),
    "more key heads": (key_heads(8), ValueError, ("k:", "divides q's 4", "8")),
    "no key heads": (key_heads(0), ValueError, ("k:", "divides q's 4", "0")),
    "length of v": ({"v": torch.randn(B, HKV, 6, D)}, ValueError, ("v:", "length 5", "6")),
    "head_dim of k": ({"k": torch.randn(B, HKV, SK, 7)}, ValueError, ("k:", "head_dim 8", "7")),
    "head_dim 0": (
        {"q": torch.ones(B, HQ, SQ, 0), "k": torch.ones(B, HKV, SK, 0)},
        ValueError,
        ("at least 1", "0 in q"),
    ),
}

SHARED = {
    "a nested softcap": ({"softcap": NESTED}, TypeError, ("softcap:", "number", "nested tensor")),
    "nested sinks": ({"sinks": NESTED}, TypeError, ("sinks:", "dense tensor [Hq]", "nested tensor")),
    "sparse sinks": ({"sinks": torch.zeros(HQ).to_sparse()}, TypeError, ("sinks:", "dense tensor [Hq]", "sparse")),
    "a sparse mask": ({"mask": torch.ones(SQ, SK).bool().to_sparse()}, TypeError, ("mask:", "dense", "sparse")),
    "causal": ({"causal": 1}, TypeError, ("causal:", "bool", "int 1")),
    "return_aux": ({"return_aux": "yes"}, TypeError, ("return_aux:", "bool", "'yes'")),
    "backend": ({"backend": "cuda"}, ValueError, ("backend:", "auto, triton, sdpa, reference", "'cuda'")),
    "backend type": ({"backend": None}, ValueError, ("backend:", "None")),
    "window type": ({"window": 3}, TypeError, ("window:", "(left, right)", "3")),
    "window of three": ({"window": (1, 2, 3)}, TypeError, ("window:", "(1, 2, 3)")),
    "window of floats": ({"window": (1.0, 2)}, TypeError, ("window:", "int or None", "1.0")),
    "window of bools": ({"window": (True, 2)}, TypeError, ("window:", "int or None", "True")),
    "negative window": ({"window": (-2, 0)}, ValueError, ("window:", "-1 or None", "(-2, 0)")),
    "key_lengths type": ({"key_lengths": [1, 2]}, TypeError, ("key_lengths:", "tensor [B]", "list")),
    "key_lengths dtype": ({"key_lengths": torch.ones(B)}, TypeError, ("key_lengths:", "integer", "float32")),
    "key_lengths bool": ({"key_lengths": torch.ones(B).bool()}, TypeError, ("key_lengths:", "integer", "bool")),
    "key_lengths shape": ({"key_lengths": torch.ones(3).int()}, ValueError, ("key_lengths:", "[B] = [2]", "[3]")),
    "key_lengths device": (
        {"key_lengths": torch.ones(B).int().to("meta")},
        ValueError,
        ("key_lengths:", "cpu", "meta"),
    ),
    "key_lengths below 0": ({"key_lengths": torch.tensor([-1, 2])}, ValueError, ("key_lengths:", "[0, Sk = 5]", "-1")),
    "key_lengths above Sk": ({"key_lengths": torch.tensor([6, 2])}, ValueError, ("key_lengths:", "[0, Sk = 5]", "6")),
    "key_ranges shape": ({"key_ranges": torch.zeros(B, SQ).int()}, ValueError, ("key_ranges:", "[2, 3, 2]", "[2, 3]")),
    "key_ranges dtype": ({"key_ranges": torch.zeros(B, SQ, 2)}, TypeError, ("key_ranges:", "integer", "float32")),
    "key_ranges values": ({"key_ranges": torch.full((B, SQ, 2), 9)}, ValueError, ("key_ranges:", "[0, Sk = 5]", "9")),
    "mask type": ({"mask": "causal"}, TypeError, ("mask:", "tensor [B, Hq, Sq, Sk]", "'causal'")),
    "mask dtype": ({"mask": torch.zeros(SQ, SK)}, TypeError, ("mask:", "torch.bool", "torch.float32")),
    "mask of B, Sk": ({"mask": torch.ones(B, SK).bool()}, ValueError, ("mask:", "[2, 4, 3, 5]", "[B, 1, 1, Sk]")),
    "mask of key heads": ({"mask": torch.ones(B, HKV, SQ, SK).bool()}, ValueError, ("mask:", "[2, 2, 3, 5]")),
    "mask rank": ({"mask": torch.ones(1, B, HQ, SQ, SK).bool()}, ValueError, ("mask:", "[1, 2, 4, 3, 5]")),
    "mask device": ({"mask": torch.ones(SQ, SK, device="meta").bool()}, ValueError, ("mask:", "cpu", "meta")),
    "a denormal softcap": ({"softcap": 1e-40}, ValueError, ("softcap:", "above 0", "1e-40")),
    "softcap 0": ({"softcap": 0.0}, ValueError, ("softcap:", "above 0", "0.0")),
    "softcap nan": ({"softcap": float("nan")}, ValueError, ("softcap:", "finite", "nan")),
    "softcap type": ({"softcap": "50"}, TypeError, ("softcap:", "number", "'50'")),
    "dropout 1": ({"dropout_p": 1.0}, ValueError, ("dropout_p:", "[0, 1)", "1.0")),
    "dropout negative": ({"dropout_p": -0.1}, ValueError, ("dropout_p:", "[0, 1)", "-0.1")),
    "dropout None": ({"dropout_p": None}, TypeError, ("dropout_p:", "number", "NoneType")),
    "sinks shape": ({"sinks": torch.zeros(HKV)}, ValueError, ("sinks:", "[Hq] = [4]", "[2]")),
    "sinks dtype": ({"sinks": torch.zeros(HQ).int()}, TypeError, ("sinks:", "floating", "int32")),
    "sinks type": ({"sinks": 0.0}, TypeError, ("sinks:", "tensor [Hq]", "float")),
    "sinks device": ({"sinks": torch.zeros(HQ, device="meta")}, ValueError, ("sinks:", "cpu", "meta")),
}


def factors(name: str, axes: str) -> dict:
    return {
        f"{name} of heads": ({name: torch.ones(HQ)}, ValueError, (f"{name}:", "[H, 1]", "1-D [4]")),
        f"{name} of rows": ({name: torch.ones(SQ)}, ValueError, (f"{name}:", "[1, S]", "1-D [3]")),
        f"{name} shape": ({name: torch.ones(B, 3, 7)}, ValueError, (f"{name}:", axes, "[2, 3, 7]")),
        f"{name} rank": ({name: torch.ones(1, 1, 1, 1)}, ValueError, (f"{name}:", axes, "[1, 1, 1, 1]")),
        f"{name} dtype": ({name: torch.ones(HQ, 1).int()}, TypeError, (f"{name}:", "floating", "torch.int32")),
        f"{name} sparse": ({name: torch.ones(HQ, 1).to_sparse()}, TypeError, (f"{name}:", "dense", "sparse")),
        f"{name} device": ({name: torch.ones(1, 1, device="meta")}, ValueError, (f"{name}:", "cpu", "meta")),
    }


SCALING = factors("scaling", "[B, Hq, Sq] = [2, 4, 3]") | {
    "unknown": ({"scaling": "vaswani"}, ValueError, ("scaling:", "sqrt_dim, dim, none", "'vaswani'")),
    "misspelt": ({"scaling": "key_norm_meen"}, ValueError, ("did you mean 'key_norm_mean'",)),
    "code": ({"scaling": "__import__('os').abort()"}, ValueError, ("scaling:", "__import__('os').abort()")),
    "attribute": ({"scaling": "__class__"}, ValueError, ("scaling:", "'__class__'")),
    "class": ({"scaling": KeyNormSum}, TypeError, ("scaling:", "instance", "write KeyNormSum()")),
    "another class": ({"scaling": dict}, TypeError, ("scaling:", "a name, a Scaling, a float or a tensor")),
    "None": ({"scaling": None}, TypeError, ("scaling:", "a name", "NoneType")),
    "bool": ({"scaling": True}, TypeError, ("scaling:", "a name")),
    "infinite": ({"scaling": float("inf")}, ValueError, ("scaling:", "finite", "inf")),
    "ssmax": ({"scaling": "ssmax"}, ValueError, ("'ssmax'", "module", "tritonattn.nn.SSMax(heads=Hq)")),
    "power_law": ({"scaling": "power_law"}, ValueError, ("'power_law'", "module")),
    "per_head": ({"scaling": "per_head"}, ValueError, ("'per_head'", "nn.PerHead('sqrt_dim', heads=Hq)")),
}
GAIN = factors("gain", "[B, Hq, Sq] = [2, 4, 3]") | {
    "gain type": ({"gain": "2"}, TypeError, ("gain:", "number", "'2'")),
    "gain nan": ({"gain": float("nan")}, ValueError, ("gain:", "finite", "nan")),
}
GIVEN = factors("query_scale", "[B, Hq, Sq] = [2, 4, 3]") | {
    "query_scale float": ({"query_scale": 2.0}, TypeError, ("query_scale:", "tensor [B, Hq, Sq]", "float 2.0")),
    "key_scale of heads": ({"key_scale": torch.ones(HKV)}, ValueError, ("key_scale:", "[H, 1]", "1-D [2]")),
    "key_scale of heads of q": (
        {"key_scale": torch.ones(B, HQ, SK)},
        ValueError,
        ("key_scale:", "[2, 2, 5]", "[2, 4, 5]"),
    ),
    "scale type": ({"scale": torch.ones(())}, TypeError, ("scale:", "number", "tensor")),
    "scale infinite": ({"scale": float("-inf")}, ValueError, ("scale:", "finite", "-inf")),
}


def refuses(call, arguments, error, fragments) -> None:
    with pytest.raises(error) as caught:
        call(**operands(**arguments))
    missing = [part for part in fragments if part not in str(caught.value)]
    assert not missing, f"{caught.value} lacks {missing}"


@pytest.mark.parametrize("case", OPERANDS | SHARED)
@pytest.mark.parametrize("call", [tritonattn.attention, tritonattn.scaled_attention])
def test_operands_and_shared_arguments(call, case):
    refuses(call, *(OPERANDS | SHARED)[case])


@pytest.mark.parametrize("case", SCALING | GAIN)
def test_scaling_and_gain(case):
    refuses(tritonattn.attention, *(SCALING | GAIN)[case])


@pytest.mark.parametrize("case", GIVEN)
def test_given_scales(case):
    refuses(tritonattn.scaled_attention, *GIVEN[case])


def test_everything_but_the_operands_is_keyword_only():
    with pytest.raises(TypeError):
        tritonattn.attention(*operands().values(), "sqrt_dim")


def test_misspelt_arguments_are_refused():
    with pytest.raises(TypeError, match="is_causal"):
        tritonattn.attention(**operands(), is_causal=True)
