"""Every argument of every public call, on every backend, changes what comes out or is refused by name."""

import inspect
from typing import Any

import pytest
import torch

import tritonattn
from tests.support.calls import operands
from tests.support.packed import Packed, offsets, packed_operands

B, HQ, SQ, SK = 2, 4, 5, 7
BACKENDS = ("sdpa", "reference")

# For every argument a value that must make a difference. Operands are covered by the gradients.
FORMS: dict[str, Any] = {
    "causal": True,
    "window": (1, 0),
    "key_bias": torch.linspace(-1, 1, SK)[None],
    "softcap": 0.5,
    "sinks": torch.tensor([0.5, -1.0, 0.0, 2.0]),
    "dropout_p": 0.5,
}
MASKS: dict[str, Any] = {
    "key_lengths": torch.tensor([3, 6]),
    "key_ranges": torch.tensor([1, 4]).expand(B, SQ, 2),
    "mask": torch.arange(SK) % 2 == 0,
}
MODE: dict[str, Any] = {"scaling": "key_norm_sum", "gain": torch.full((HQ, 1), 2.0)}
SCALES: dict[str, Any] = {
    "query_scale": torch.full((HQ, SQ), 2.0),
    "key_scale": torch.linspace(0, 1, SK)[None],
    "scale": 0.1,
    "relative_scale": torch.tensor([0.5, -1.0, 2.0])[None, None, None],
}
DISTANCES: dict[str, Any] = {
    "relative_bias": torch.tensor([0.5, -1.0, 2.0])[None, None, None],
    "relative_right": 1,
    "bias_after_softcap": True,
}
PAIRS: dict[str, Any] = {"bias": torch.linspace(-1, 1, SQ * SK).view(SQ, SK), **DISTANCES}
OF_PACKED: dict[str, Any] = DISTANCES | {"relative_bias": DISTANCES["relative_bias"][0]}
PACKING: dict[str, Any] = {"cu_seqlens_q": offsets((2, 3)), "cu_seqlens_k": offsets((4, 3))}
# Arguments that have no effect alone, and those with which they have one.
WITH = {"relative_right": ("relative_bias",), "bias_after_softcap": ("relative_bias", "softcap")}
REFUSED: dict[str, Any] = {"max_seqlen_q": 1, "max_seqlen_k": 1}  # no other effect on a CPU: they plan launches

CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "attention": ({}, FORMS | PAIRS | MASKS | MODE),
    "scaled_attention": ({}, FORMS | PAIRS | MASKS | SCALES),
    "attention_varlen": (Packed((4, 1), (3, 4)).arguments(), FORMS | OF_PACKED | MODE | PACKING | REFUSED),
}
CASES = [(call, argument) for call, (_, arguments) in CALLS.items() for argument in arguments]


def tensors_of(call: str) -> dict[str, torch.Tensor]:
    return packed_operands(Packed((SQ,), (SK,))) if call == "attention_varlen" else operands()


def outcome(call: str, backend: str, **arguments) -> list[torch.Tensor]:
    """out, lse and the gradients of q, k and v; without aux out alone, from the path that calls without it take."""
    torch.manual_seed(0)
    leaves, function = tensors_of(call), getattr(tritonattn, call)
    plain = function(**leaves, backend=backend, **arguments)
    torch.manual_seed(0)
    out, aux = function(**leaves, backend=backend, return_aux=True, **arguments)
    lse = torch.where(aux.lse.isfinite(), aux.lse, 0)
    return [plain, out, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves.values())]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("call", "argument"), CASES)
def test_an_argument_makes_a_difference(call, argument, backend):
    base, arguments = CALLS[call]
    base = base | {name: arguments[name] for name in WITH.get(argument, ())}
    changed = base | {argument: arguments[argument]}
    if argument in REFUSED:
        with pytest.raises(ValueError, match=argument):
            outcome(call, backend, **changed)
        return
    for with_it, without in zip(outcome(call, backend, **changed), outcome(call, backend, **base), strict=True):
        assert with_it.isfinite().all()
        assert not torch.allclose(with_it, without)


@pytest.mark.parametrize("call", CALLS)
def test_no_argument_is_forgotten_here(call):
    base, arguments = CALLS[call]
    parameters = set(inspect.signature(getattr(tritonattn, call)).parameters)
    over_pages = {"block_table", "statistics", "k_descale", "v_descale"} if call == "attention_varlen" else set()
    known = {"q", "k", "v", "return_aux", "backend", "batch_invariant"} | over_pages
    assert parameters == known | set(base) | set(arguments)


def test_no_public_call_is_forgotten_here():
    public = {name for name in tritonattn.__all__ if inspect.isfunction(getattr(tritonattn, name))}
    others = {"attention_decode", "batch_invariant", "check_scaling", "document_ranges", "warmup"}
    others |= {"key_counts", "key_counts_decode", "key_counts_varlen"}
    assert public - others == set(CALLS)
