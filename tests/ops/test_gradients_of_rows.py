"""Gradients of the statistics of rows, lse, max_logit and entropy, against torch's of the dense reference."""

from dataclasses import replace

import pytest
import torch

import tritonattn
from tests.support.calls import CALLS, changed, example, operands
from tests.support.derivatives import results_of_reference, tensors_of
from tests.support.masks import MASKS
from tests.support.pairs import pairwise
from tritonattn import nn, ops
from tritonattn.backends.cpu import tiles

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script")  # of the first torch.func.jvp

EVERYTHING = {"sinks": True, "bias": True, "softcap": 2.0, "pairs": (2, 4), "distances": True, "dropout": True}
NAMES = ("out", "lse", "max_logit", "entropy")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 8 rows (over a group's heads) and 4 keys, a head or two at a time."""
    monkeypatch.setattr(tiles, "_ROWS", 8)
    monkeypatch.setattr(tiles, "KEYS", 4)
    monkeypatch.setattr(tiles, "_PAIRS", 32)


def gradients(call, attend, names):
    leaves = {name: x.clone().requires_grad_() for name, x in tensors_of(call).items()}
    results = attend(changed(call, **leaves, aux=True))
    random = torch.Generator().manual_seed(7)
    loss = 0.0
    for name in NAMES:
        x = getattr(results, name)
        weight = torch.randn(x.shape, generator=random, dtype=x.dtype)
        if name in names:
            loss = loss + (torch.where(x == -torch.inf, 0, x) * weight).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def check(call, names=NAMES):
    ours, exact = (gradients(call, attend, names) for attend in (ops.attention, results_of_reference))
    for name, x in ours.items():
        torch.testing.assert_close(x, exact[name], rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pairwise(
    case=[*CALLS, "everything"],
    step=["one tile", "tiles", "tiles not read"],
    names=[("max_logit",), ("entropy",), NAMES],
)
def test_every_term(case, step, names, request, monkeypatch):
    if step != "one tile":
        request.getfixturevalue("small_tiles")
    if step == "tiles not read":
        monkeypatch.setattr(tiles, "readable", lambda device: False)
    check(example(**CALLS.get(case, EVERYTHING)), names)


@pairwise(mask=MASKS, form=["scales", "everything"])
@pytest.mark.usefixtures("small_tiles")
def test_every_mask(mask, form):
    check(example(**(EVERYTHING if form == "everything" else {}), **MASKS[mask](2, 4, 5, 7)))


def test_the_entropy_of_a_call_under_batch_invariance():
    call = example(softcap=2.0, causal=True)
    check(call.changed(visibility=replace(call.visibility, invariant=True)), ("out", "lse", "entropy"))


def statistics(q, k, v, **options):
    return tritonattn.attention(q, k, v, return_aux=True, **options)[1]


def test_ties_go_to_the_lowest_key():
    q, k, v = (torch.ones(1, 1, n, 4, dtype=torch.float64, requires_grad=True) for n in (2, 300, 300))
    for backend in ("sdpa", "reference"):
        (d_k,) = torch.autograd.grad(statistics(q, k, v, backend=backend).max_logit.sum(), k)
        assert d_k[0, 0, 0].tolist() == [1.0] * 4  # two rows, a scale of 1 / 2
        assert not d_k[0, 0, 1:].any()


@pytest.mark.parametrize("result", ["max_logit", "entropy"])
def test_hidden_nan_keys_reach_nothing(result):
    q, k, v = (x.detach() for x in operands().values())
    k, v = k.clone(), v.clone()
    k[:, :, 5:], v[:, :, 5:] = torch.nan, torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    aux = statistics(*leaves, key_lengths=torch.tensor([0, 5]), backend="sdpa")
    found = torch.autograd.grad(getattr(aux, result).nan_to_num(neginf=0.0).sum(), leaves[:2])
    for x in found:
        assert x.isfinite().all()
        assert not x[0].any()
        assert x[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("result", ["max_logit", "entropy"])
def test_a_learned_scaling_has_a_gradient(result, dtype):
    tensors = operands(dtype, lengths=(7, 7))
    found = []
    for backend, wide in (("sdpa", dtype), ("reference", torch.float64)):
        scaling = nn.SSMax(4)
        aux = statistics(*(x.to(wide) for x in tensors.values()), scaling=scaling, causal=True, backend=backend)
        found.append(torch.autograd.grad(getattr(aux, result).sum(), list(scaling.parameters())))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact.to(ours), rtol=1e-4, atol=1e-5)
        assert ours.abs().max() > 0.01


def test_packed_sequences_are_those_of_a_batch():
    tensors = {name: x.detach() for name, x in operands(lengths=(6, 6)).items()}
    ends = torch.tensor([0, 6, 12], dtype=torch.int32)

    def loss(aux):
        return (aux.entropy.sin() + aux.max_logit.cos()).sum()

    batch = [x.clone().requires_grad_() for x in tensors.values()]
    loss(statistics(*batch, causal=True, backend="sdpa")).backward()
    packed = [x.transpose(1, 2).flatten(0, 1).requires_grad_() for x in tensors.values()]
    options = {"causal": True, "return_aux": True, "backend": "sdpa"}
    _, aux = tritonattn.attention_varlen(*packed, ends, ends, 6, 6, **options)
    loss(aux).backward()
    for x, of_batch in zip(packed[:2], batch, strict=False):
        torch.testing.assert_close(x.grad, of_batch.grad.transpose(1, 2).flatten(0, 1), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("result", ["max_logit", "entropy"])
class TestRefusals:
    def test_gradients_of_gradients(self, result):
        q, k, v = operands().values()
        (d_q,) = torch.autograd.grad(getattr(statistics(q, k, v, backend="sdpa"), result).sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match="max_logit and entropy have no gradients of gradients"):
            (d_q.square().sum() + q.sum()).backward()  # q's: so that a gradient without a graph raises nothing

    def test_forward_mode(self, result):
        q, k, v = (x.detach() for x in operands().values())

        def of(backend):
            return torch.func.jvp(lambda q: getattr(statistics(q, k, v, backend=backend), result), (q,), (q,))

        with pytest.raises(NotImplementedError, match=f"{result}: no forward-mode derivatives"):
            of("sdpa")
        assert of("reference")[1].isfinite().all()


def test_the_largest_logit_has_no_gradient_under_batch_invariance():
    q, k, v = operands(torch.float32).values()
    with tritonattn.batch_invariant(), pytest.raises(NotImplementedError, match=r"batch_invariant: .* max_logit"):
        statistics(q, k, v, causal=True, backend="sdpa").max_logit.sum().backward()


def test_a_gradient_under_transforms_and_in_a_compiled_call():
    q, k, v = (x.detach() for x in operands().values())

    def loss(q):
        aux = statistics(q, k, v, backend="sdpa")
        return (aux.entropy.sin() + aux.max_logit.cos()).sum()

    leaf = q.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(q), leaf.grad)
    again = q.clone().requires_grad_()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(again).backward()
    torch.testing.assert_close(again.grad, leaf.grad)
