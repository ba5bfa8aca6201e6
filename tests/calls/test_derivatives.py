"""Derivatives of forward mode and of second order of the public functions, against the reference in float64."""

import weakref

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import tritonattn
from tests.support.bound import assert_within_bound
from tests.support.learned import LEARNED, learned, small
from tests.support.masks import MASKS
from tests.support.orders import FORMS, Example, assert_as_reference, every_term, packed, scaled
from tests.support.pairs import in_turn, pairwise
from tritonattn import SCALINGS
from tritonattn.backends.cpu import Sdpa
from tritonattn.core.statistics import reciprocal_root
from tritonattn.core.terms import AXES, Gradients, others_than
from tritonattn.ops import passes
from tritonattn.scaling import Scales, Scaling

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script", "ignore:There is a performance drop")

# Torch 2.8 hides our words, 2.14 refuses by itself.
NOT_COMPILED = "a tangent of attention is not compiled|Observed exception|wrap a dual tensor"
ROWS = {"query_scale": torch.linspace(-1, 2, 20, dtype=torch.float64).view(1, 4, 5)}
KEYS = {"key_scale": torch.linspace(-2, 1, 14, dtype=torch.float64).view(1, 2, 7)}
TABLE = {"relative_scale": torch.linspace(2, -1, 12, dtype=torch.float64).view(1, 4, 1, 3)}
FEW_KEYS = {"bias": torch.linspace(-1, 2, 70, dtype=torch.float64).view(1, 2, 5, 7)}
OF_SCALED = ("key_scale", "relative_scale")  # terms of "scaled" that "every term" lacks
SQUARE = {"lengths": (6, 6), "dims": (4, 4)}
CALLS = {
    "full": lambda: Example(),
    "bias": lambda: Example(tensors=FEW_KEYS, scaling="key_norm_mean", shapes={"heads": (2, 2)}),
    "square causal": lambda: Example(causal=True, scaling="key_norm_sum", shapes=SQUARE),
    "cosine": lambda: Example(causal=True, scaling="cosine", return_aux=True),
    "window": lambda: Example(window=(2, 1), scaling="key_norm_max", softcap=1.5),
    "mask": lambda: Example(scaling="key_norm_rms", **MASKS["mask of heads"](1, 4, 5, 7)),
    "packed": lambda: Example(packed, causal=True, scaling="key_norm_mean"),
    "scaled": lambda: Example(scaled, ROWS | KEYS | TABLE, causal=True, return_aux=True),
    "every term": lambda: Example(
        tensors=every_term(), scaling="log_key_count", causal=True, softcap=2.0, relative_right=1, return_aux=True
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form(form, call):
    assert_as_reference(CALLS[call](), form)


TWO_FORMS = ("gradient of a gradient", "gradient of a jvp")


@in_turn(mode=SCALINGS, form=TWO_FORMS, mask=["causal", "window", "lengths", "ranges", "mask of heads"])
def test_every_mode(mode, form, mask):
    assert_as_reference(Example(scaling=small(mode), **MASKS[mask](1, 4, 5, 7)), form)


@in_turn(name=LEARNED, form=TWO_FORMS[::-1], mask=["causal", "window", "lengths"])
def test_learned_modes_and_their_parameters(name, form, mask):
    assert_as_reference(Example(scaling=learned(name), **MASKS[mask](1, 4, 5, 7)), form)


@in_turn(mask=MASKS, form=[*FORMS][::-1], scaling=["key_norm_mean", "key_norm_max", "cosine"])
def test_every_mask(mask, form, scaling):
    assert_as_reference(Example(scaling=scaling, **MASKS[mask](1, 4, 5, 7)), form)


class Steep(Scaling):
    """A user's mode: q's norm over the root of the sum of squares of keys, and a bias of keys."""

    def scales(self, q, k, visibility, statistics):
        rows = visibility.repeated(reciprocal_root(statistics.norm_square_sum))
        return Scales(0.5, (statistics.query_norms(q) * rows).to(q.dtype), key_bias=statistics.norms)

    def multiplier(self, q, k, visible):
        squares = torch.where(visible, k.square().sum(-1)[:, :, None], 0).sum(-1, keepdim=True)
        return 0.5 * q.norm(dim=-1, keepdim=True) / squares.sqrt()

    def addend(self, q, k, visible):
        return k.norm(dim=-1)[:, :, None]


@pytest.mark.parametrize("form", TWO_FORMS)
def test_a_users_scaling(form):
    assert_as_reference(Example(scaling=Steep(), causal=True), form)


@pytest.mark.parametrize("form", ["jvp", "duals", "gradient of a gradient", "jvp of a gradient", "gradient of a jvp"])
def test_dropout(form):
    assert_as_reference(Example(scaling="cosine", causal=True, dropout_p=0.4), form)


@pairwise(
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    form=["jvp", "gradient of a gradient", "jvp of a gradient", "gradient of a jvp"],
    scaling=["sqrt_dim", "cosine"],
    masks=[{"causal": True}, {"window": (8, 0), "softcap": 3.0}, {"key_lengths": torch.tensor([33])}],
)
def test_in_the_bound(dtype, form, scaling, masks):
    example = Example(scaling=scaling, shapes={"lengths": (40, 40), "dims": (16, 16)}, **masks)
    x, u = (tuple(one.to(dtype) for one in some) for some in (example.x, example.u))
    exact = FORMS[form](example.on("reference"), *(tuple(one.double() for one in some) for some in (x, u)))
    ours, eager = (FORMS[form](example.on(backend), x, u) for backend in ("sdpa", "reference"))
    for n, (result, wanted, other) in enumerate(zip(ours, exact, eager, strict=True)):
        assert_within_bound(result, wanted, other, dtype, name=f"{form} {n}")


# ---- A tangent or a gradient that is lost


def _without(record: Gradients, name: str) -> Gradients:
    x = getattr(record, name)
    assert x is not None
    return record._replace(**{name: torch.zeros_like(x)})


def _lose(monkeypatch: pytest.MonkeyPatch, which: str, name: str) -> None:
    """Let a pass of the backend lose what goes through one of its slots."""
    tangent, second = Sdpa.tangent, Sdpa.second

    def tangent_with_loss(self, call, saved, tangents):
        if which == "tangent takes":
            tangents = _without(tangents, name)
        found = tangent(self, call, saved, tangents)
        return [torch.zeros_like(x) if which == f"tangent gives {n}" else x for n, x in enumerate(found)]

    def second_with_loss(self, call, saved, asked):
        if which == "second takes":
            asked = asked._replace(tangents=_without(asked.tangents, name))
        if which == "second takes d_out":
            asked = asked._replace(d_out=asked.d_out * 0)
        if which == "second takes d_lse":
            asked = asked._replace(d_lse=None)
        found = second(self, call, saved, asked)
        return [_without(x, name) if which == f"second gives {n}" else x for n, x in enumerate(found)]

    monkeypatch.setattr(Sdpa, "tangent", tangent_with_loss)
    monkeypatch.setattr(Sdpa, "second", second_with_loss)


SLOTS = [
    *(("gradient of a jvp", which, "") for which in ("tangent gives 0", "tangent gives 1")),
    *(("gradient of a jvp", which, "") for which in ("second takes d_out", "second takes d_lse")),
    *(("gradient of a jvp", "second gives 1", name) for name in AXES if name not in OF_SCALED),
    *(
        (form, which, name)
        for form in TWO_FORMS
        for which in ("tangent takes", "second takes", "second gives 0")
        for name in AXES
        if name not in OF_SCALED
    ),
]


@pytest.mark.parametrize(("form", "which", "name"), SLOTS)
def test_a_lost_derivative_is_noticed(form, which, name, monkeypatch):
    _lose(monkeypatch, which, name)
    with pytest.raises(AssertionError, match=form):
        assert_as_reference(CALLS["every term"](), form)


@pytest.mark.parametrize("name", OF_SCALED)
@pytest.mark.parametrize("which", ["tangent takes", "second takes", "second gives 0", "second gives 1"])
def test_a_lost_derivative_of_a_given_scale_is_noticed(which, name, monkeypatch):
    _lose(monkeypatch, which, name)
    with pytest.raises(AssertionError, match="gradient of a jvp"):
        assert_as_reference(CALLS["scaled"](), "gradient of a jvp")


# ---- Identities


@pytest.mark.parametrize("call", ["bias", "square causal", "window"])
def test_finite_differences(call):
    example = CALLS[call]()
    leaves = [x.clone().requires_grad_() for x in example.x]
    assert gradcheck(example.on("sdpa"), leaves, fast_mode=True, check_forward_ad=True, check_batched_forward_grad=True)
    assert gradgradcheck(example.on("sdpa"), leaves, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("call", CALLS)
def test_forward_and_reverse_mode_are_transposes(call):
    example = CALLS[call]()
    out, pull = torch.func.vjp(example.on("sdpa"), *example.x)
    _, tangent = torch.func.jvp(example.on("sdpa"), example.x, example.u)
    along = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    pairs = zip(pull(along), example.u, strict=True)
    torch.testing.assert_close((along * tangent).sum(), sum((x * u).sum() for x, u in pairs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("call", ["cosine", "window", "packed", "every term"])
def test_a_tangent_of_zero_leaves_the_bits_alone(call, dtype):
    """Of calls that do not take PyTorch's kernel, which has no tangent."""
    example = CALLS[call]()
    x = tuple(one.to(dtype) for one in example.x)
    wanted = example.on("sdpa")(*[one.requires_grad_() for one in x])
    out, tangent = torch.func.jvp(example.on("sdpa"), x, tuple(map(torch.zeros_like, x)))
    assert torch.equal(out, wanted)
    assert not tangent.any()


# ---- Refusals


def _forward(f):
    return lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]


def _reverse(f):
    return torch.func.grad(lambda x: f(x).sin().sum())


@pytest.mark.parametrize("form", ["ff", "ffr", "frf", "rrr", "rrf", "rfr", "frr"])
@pytest.mark.parametrize("call", ["full", "every term"])
def test_third_derivatives_are_refused(form, call):
    """Outermost first."""
    q, *others = (example := CALLS[call]()).x
    over = "third derivatives" if "ff" not in form and form != "frf" else "forward mode over forward mode"
    for backend, refusal in (("sdpa", over), ("reference", None)):
        function = lambda x, backend=backend: example.on(backend)(x, *others)  # noqa: E731
        for step in reversed(form):
            function = {"f": _forward, "r": _reverse}[step](function)
        if refusal is None:
            assert function(q).isfinite().all()
            continue
        with pytest.raises(NotImplementedError, match=f'tritonattn: {refusal} .*backend="reference" has'):
            function(q)


@pytest.mark.parametrize("form", ["jvp", "gradient of a gradient"])
@pytest.mark.parametrize("call", ["square causal", "packed"])
def test_batch_invariance_is_refused(form, call):
    example = CALLS[call]()
    example.options["batch_invariant"] = True
    with pytest.raises(NotImplementedError, match=r"^batch_invariant: .*\(jvp\) and gradients of gradients"):
        FORMS[form](example.on("sdpa"), example.x, example.u)


def test_a_compiled_tangent_is_refused():
    q = torch.randn(1, 2, 6, 8)
    compiled = torch.compile(lambda q: tritonattn.attention(q, q, q), backend="eager", fullgraph=True)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=NOT_COMPILED):
        compiled(forward_ad.make_dual(q, q))


# ---- Where tensors are kept


@pytest.mark.parametrize("call", ["full", "bias", "square causal", "cosine"])
def test_under_saved_tensor_hooks_and_checkpoints(call):
    example = CALLS[call]()
    wanted = FORMS["gradient of a gradient"](example.on("sdpa"), example.x, example.u)

    def offloaded(*tensors):
        unpacked = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: unpacked.append(x) or x.clone()):
            out = example.on("sdpa")(*tensors)
        assert unpacked == []
        return out

    def checkpointed(*tensors):
        return checkpoint(example.on("sdpa"), *tensors, use_reentrant=False)

    for function in (offloaded, checkpointed):
        found = FORMS["gradient of a gradient"](function, example.x, example.u)
        torch.testing.assert_close(found, wanted)


def test_the_graph_of_pytorchs_kernel_keeps_no_tensor_alive():
    q, k, v = (x.clone().requires_grad_() for x in Example(shapes={"heads": (2, 2)}).x)
    twice = 2 * k
    out, key = tritonattn.attention(q, twice, v), weakref.ref(twice)
    del twice
    assert key() is not None
    torch.autograd.grad(out.sum(), q)
    assert key() is None


@pytest.mark.parametrize("form", TWO_FORMS)
def test_a_term_that_tangents_do_not_list_is_refused_by_name(form, monkeypatch):
    monkeypatch.setattr(passes, "_LACKED", others_than("query_scale", "key_scale"))
    with pytest.raises(NotImplementedError, match=r"^softcap: .*\(jvp\) and gradients of gradients; backend="):
        assert_as_reference(Example(causal=True, softcap=2.0), form)
    assert_as_reference(Example(causal=True), form)
