"""The operators: schema, fake kernels, gradients, and what must be refused loudly."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from tests.support.calls import CALLS, changed, example
from tests.support.calls import torch_kernels as kernels_by_torch
from tests.support.orders import FORMS
from tests.support.pairs import in_turn
from tests.support.refusals import refuses
from tritonattn import ops
from tritonattn.core.call import ForwardResult, RowGradients
from tritonattn.core.norms import key_norms_of
from tritonattn.core.statistics import Statistics
from tritonattn.core.terms import Gradients
from tritonattn.core.visibility import Visibility
from tritonattn.ops import statistics as by_kernels
from tritonattn.ops.operators import flat

FIELDS = Gradients._fields


def differentiable(call) -> dict[str, Tensor]:
    pairs = zip(Gradients._fields, call.tensors(), strict=True)
    return {name: x for name, x in pairs if x is not None}


def loss(result: ForwardResult) -> Tensor:
    return result.out.square().sum() + result.lse.clamp(min=-50).sin().sum()


def _rounded(call):
    """As calls that keep a rounding on a CPU: v in bf16, and the others in fp32."""
    dtypes = {name: torch.bfloat16 if name == "v" else torch.float32 for name in FIELDS}
    return changed(
        call, **{name: x.detach().to(dtypes[name]).requires_grad_() for name, x in differentiable(call).items()}
    )


# opcheck's, from torch 2.15 on
opcheck_reads_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


# Every argument of the operators, in few calls.
WHOLE = {
    "plain": {"scales": False},
    "dense": {**CALLS["mask sinks"], **CALLS["window lengths"], "bias": True, "softcap": 2.0, "dropout": True},
    "pairs": CALLS["biases after softcap"],
    "packed": CALLS["packed sinks dropout"],
}


@opcheck_reads_grad
@in_turn(case=WHOLE, aux=[False, True], keep_rounding=[False, True, True])
def test_operators_pass_opcheck(case, aux, keep_rounding):
    call = _rounded(example(**WHOLE[case])) if keep_rounding else example(**WHOLE[case])
    opcheck(torch.ops.tritonattn.forward.default, (*flat(changed(call, aux=aux)), keep_rounding))
    arguments = flat(call)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    out, lse, *_ = (x if x is None else x.detach() for x in ops.attention(call))
    needs = [x is not None for x in arguments[: len(FIELDS)]]
    needs[1] = case != "dense"
    rounding = torch.zeros_like(out, dtype=torch.int8) if keep_rounding else None
    results, d_rows = (out, lse, rounding), RowGradients()
    if aux:
        d_rows = RowGradients(None, *[torch.ones_like(lse) for _ in range(3)])
    opcheck(torch.ops.tritonattn.backward.default, (*detached, *results, torch.ones_like(out), *d_rows, needs))
    tangents = [None if x is None else torch.ones_like(x) for x in detached[: len(FIELDS)]]
    tangents[0] = None
    tests = {"test_utils": ("test_schema", "test_faketensor")}
    opcheck(torch.ops.tritonattn.tangent.default, (*detached, *results, *tangents), **tests)
    given = *detached, *results, *tangents, torch.ones_like(out), None, [*needs, *(x is not None for x in tangents)]
    opcheck(torch.ops.tritonattn.second.default, given, **tests)


@torch.no_grad()
def test_the_operator_over_pages_passes_opcheck():
    k, v = (torch.randn(4, 2, 16, width, dtype=torch.float64) for width in (8, 6))
    call = changed(example(**CALLS["packed"]), k=k, v=v, block_table=torch.tensor([[1], [3], [-1]]).int())
    opcheck(torch.ops.tritonattn.forward.default, (*flat(changed(call, aux=True)), False))


@pytest.mark.parametrize("case", CALLS)
def test_the_operator_itself_differentiates(case):
    call = _rounded(example(**CALLS[case]))
    leaves = tuple(differentiable(call).values())
    wanted = torch.autograd.grad(loss(ops.attention(call)), leaves)
    out, lse, *_ = torch.ops.tritonattn.forward(*flat(call), True)
    result = ForwardResult(out, lse)
    torch.testing.assert_close(torch.autograd.grad(loss(result), leaves), wanted, rtol=0, atol=0)


def test_nothing_is_kept_without_gradients():
    call = example(causal=True)
    with torch.no_grad():
        assert ops.attention(call).out.grad_fn is None


@pytest.mark.parametrize("written", ["q", "k", "v", "query_scale", "key_scale", "sinks", "mask", "out"])
def test_a_saved_tensor_changed_in_place_is_noticed(written):
    call = example(mask=torch.ones(5, 7).bool(), sinks=True)
    copies = {name: x.clone() for name, x in differentiable(call).items()}
    call = changed(call, **copies)
    result = ops.attention(call)
    objective = loss(result)
    tensor = {"mask": call.visibility.mask, "out": result.out}.get(written)
    tensor = copies[written] if tensor is None else tensor
    with torch.no_grad():
        tensor.zero_()
    refuses("RuntimeError: ~ modified by an inplace operation", objective.backward)


def test_the_graph_keeps_a_call_without_its_tensors():
    """Autograd has them, whose hooks may move them, and which lets them go after the backward."""
    masks = {"mask": torch.ones(5, 7).bool(), "key_lengths": torch.tensor([3, 7])}
    call = example(**masks, sinks=True, bias=True)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x) or x, lambda x: x):
        out = ops.attention(call).out
    rest = out.grad_fn.rest
    assert rest.visible is None
    assert not any(isinstance(x, Tensor) for x in rest.values)
    given = [x for x in flat(call) if isinstance(x, Tensor)]
    assert {x.data_ptr() for x in given} <= {x.data_ptr() for x in seen}
    leaves = tuple(differentiable(call).values())
    first, again = (torch.autograd.grad(out.sum(), leaves, retain_graph=keep) for keep in (True, False))
    assert all(map(torch.equal, first, again))
    refuses("RuntimeError: ~ second time", torch.autograd.grad, out.sum(), leaves)


# The pass over the keys, with torch instead of kernels.


@pytest.fixture
def torch_kernels(monkeypatch):
    monkeypatch.setattr(by_kernels, "kernels", kernels_by_torch)


@opcheck_reads_grad
@pytest.mark.usefixtures("torch_kernels")
def test_key_norms_pass_opcheck():
    k, seen = torch.randn(2, 2, 7, 8, requires_grad=True), torch.arange(7)[None, None] < torch.tensor([[[3]], [[7]]])
    opcheck(torch.ops.tritonattn.key_norms.default, (k, seen))
    norms = key_norms_of(k, seen).detach()
    for mask, added in ((None, torch.ones(k.shape)), (seen, None)):
        arguments = (k.detach(), mask, norms, torch.randn_like(norms), added)
        opcheck(torch.ops.tritonattn.key_norms_backward.default, arguments)
    for restarts in (None, torch.arange(7)[None, None] % 3 == 0):
        opcheck(torch.ops.tritonattn.prefix_sums.default, (norms, restarts))
    lo, hi = torch.tensor([[[0, 2, 5]], [[1, 1, 0]]]), torch.tensor([[[7, 4, 5]], [[7, 2, 0]]])
    opcheck(torch.ops.tritonattn.argmax_over_ranges.default, (norms, lo, hi))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's
@pytest.mark.usefixtures("torch_kernels")
def test_key_statistics_under_transforms_and_compilers():
    q = torch.empty(2, 4, 5, 8)
    k = torch.randn(3, 2, 2, 7, 8, generator=torch.Generator().manual_seed(0))

    def objective(k: Tensor) -> Tensor:
        statistics = ops.KernelStatistics(k, Visibility.of(q, k, causal=True))
        return (statistics.norm_sum.double() * statistics.norm_square_sum).sum()

    one_by_one = torch.stack([torch.func.grad(objective)(x) for x in k])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(objective))(k), one_by_one)
    leaf = k[0].clone().requires_grad_()
    torch.compile(objective, fullgraph=True, backend="aot_eager")(leaf).backward()
    torch.testing.assert_close(leaf.grad, one_by_one[0])


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("torch_kernels")
def test_derivatives_of_key_statistics(form):
    """Of norms whose keys have gradients of their own, in rows of key ranges, one of them of a hidden key of NaN."""
    random = torch.Generator().manual_seed(0)
    k, along = (torch.randn(1, 2, 7, 8, generator=random) for _ in range(2))
    k[:, :, 3] = torch.nan
    ranges = torch.tensor([[0, 3], [4, 7], [5, 5], [1, 2], [4, 6]]).expand(1, 5, 2)

    def by(kind: type[Statistics], k: Tensor) -> Tensor:
        statistics = kind(k, Visibility(1, 4, 2, 5, 7, k.device, key_ranges=ranges))
        found = statistics.norm_sum.double() + statistics.norm_square_sum + statistics.norm_max.double()
        wide = statistics.in_fp32[0][1] if statistics.in_fp32 else k
        return found.sum(1) + torch.where((statistics.norms > 0)[..., None], wide, 0).square().sum()

    results = [
        FORMS[form](partial(by, kind), (x,), (u,))
        for kind, x, u in ((ops.KernelStatistics, k, along), (Statistics, k.double(), along.double()))
    ]
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-4, equal_nan=False)
