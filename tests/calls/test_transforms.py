"""torch.compile, export, torch.func and checkpointing over the public functions."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tritonattn
from tests.support.masks import MASKS
from tests.support.pairs import in_turn, pairwise
from tests.support.versions import TORCH, skip_where_export_binds_lengths

pytestmark = [
    # torch's own, while it compiles or falls back
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script"),
]

# A constant, counts with a parameter, sums, squares in fp64, maxima, both scales.
MODES = ["sqrt_dim", "log_key_count", "key_norm_sum", "key_norm_rms", "key_norm_max", "cosine"]


def operands(batch: int = 2, length: int = 7) -> tuple[Tensor, ...]:
    """q, k, v and a gain, fp32."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, 4, length, 8), (batch, 2, length, 8), (batch, 2, length, 6), (4, 1))
    return tuple(torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)


def objective(q: Tensor, k: Tensor, v: Tensor, gain: Tensor, **arguments) -> Tensor:
    return tritonattn.attention(q, k, v, gain=gain, **arguments).square().sum()


def assert_same_gradients(function, like, leaves: tuple[Tensor, ...]) -> None:
    ours = torch.autograd.grad(function(*leaves), leaves)
    for x, expected in zip(ours, torch.autograd.grad(like(*leaves), leaves), strict=True):
        torch.testing.assert_close(x, expected)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@in_turn(scaling=MODES[1::2] + MODES[4:5], mask=["causal", "everything", "mask of heads", "ranges"])
def test_compile_forward_and_backward_in_one_graph(scaling, mask):
    function = partial(objective, scaling=scaling, **MASKS[mask](2, 4, 7, 7))
    assert_same_gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), function, operands())


def test_compile_everything_at_once():
    sinks = torch.randn(4, requires_grad=True)

    def function(q, k, v, gain, sinks):
        masks = {"key_lengths": torch.tensor([3, 7]), "mask": torch.ones(7, 7, dtype=torch.bool)}
        out, aux = tritonattn.attention(
            q,
            k,
            v,
            scaling="key_norm_mean",
            gain=gain,
            softcap=3.0,
            sinks=sinks,
            window=(2, 1),
            return_aux=True,
            **masks,
        )
        return out.sum() + aux.lse.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_gradients(compiled, function, (*operands(), sinks))


@in_turn(
    arguments=[
        {"causal": True, "scaling": "key_norm_mean"},
        {"window": (2, 0), "scaling": "key_norm_mean"},
        {"causal": True, "scaling": "key_norm_max"},
        {"window": (2, 0), "scaling": "key_norm_mean"},
    ],
    strict=[True, False, False, True],
)
def test_export(arguments, strict):
    skip_where_export_binds_lengths(strict)

    class Layer(torch.nn.Module):
        def forward(self, q, k, v, gain):
            return tritonattn.attention(q, k, v, gain=gain, **arguments)

    leaves = tuple(x.detach() for x in operands())
    dynamic = {2: torch.export.Dim("length", min=4, max=64)}
    program = torch.export.export(Layer(), leaves, strict=strict, dynamic_shapes=(dynamic, dynamic, dynamic, None))
    for length in (7, 11, 60):
        leaves = tuple(x.detach() for x in operands(length=length))
        torch.testing.assert_close(program.module()(*leaves), Layer()(*leaves))
    if "window" in arguments:
        assert torch.ops.tritonattn.forward.default in {node.target for node in program.graph.nodes}


@in_turn(options=[{"causal": True, "scaling": "key_count"}, {}, {"window": (2, 0)}], strict=[True, False])
def test_export_of_a_layer_that_learns(options, strict):
    """The layer's parameters require gradients, as those of every new layer do."""
    skip_where_export_binds_lengths(strict)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = torch.nn.Linear(8, 48)

        def forward(self, x):
            q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            return tritonattn.attention(q, k, v, **options)

    layer = Layer()
    lengths = ({1: torch.export.Dim("length", min=16, max=512)},)
    program = torch.export.export(layer, (torch.randn(2, 50, 8),), strict=strict, dynamic_shapes=lengths)
    for length in (17, 64, 200):
        x = torch.randn(2, length, 8)
        torch.testing.assert_close(program.module()(x), layer(x))


@pairwise(scaling=MODES[::2], mask=MASKS)
def test_func_grad_and_vmap_of_it(scaling, mask):
    function = partial(objective, scaling=scaling, **MASKS[mask](2, 4, 7, 7))
    gradient = torch.func.grad(function, argnums=(0, 1, 2, 3))
    leaves = operands()
    plain = torch.autograd.grad(function(*leaves), leaves)
    for ours, expected in zip(gradient(*(x.detach() for x in leaves)), plain, strict=True):
        torch.testing.assert_close(ours, expected)
    mapped = tuple(torch.stack([x.detach(), 2 * x.detach(), -x.detach()]) for x in leaves)
    together = torch.func.vmap(gradient)(*mapped)
    for i in range(3):
        for ours, expected in zip(together, gradient(*(x[i] for x in mapped)), strict=True):
            torch.testing.assert_close(ours[i], expected, rtol=1e-4, atol=1e-5)


def test_vmap_over_some_operands_masks_and_other_axes():
    q, k, v, _ = (x.detach() for x in operands())
    lengths = torch.tensor([[1, 2], [3, 4], [7, 0]])
    masks = torch.rand(3, 2, 1, 7, 7, generator=torch.Generator().manual_seed(0)) > 0.4

    def function(q, lengths, mask):
        return tritonattn.attention(q, k, v, scaling="key_norm_sum", key_lengths=lengths, mask=mask)

    wanted = torch.stack([function(i * q, lengths[i], masks[i]) for i in range(3)])
    qs = torch.stack([i * q for i in range(3)], dim=3)
    mapped = torch.func.vmap(function, in_dims=(3, 0, 0), out_dims=1)(qs, lengths, masks)
    torch.testing.assert_close(mapped, wanted.movedim(0, 1))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pairwise(
    scaling=["log_key_count", "key_norm_max", "cosine"],
    mask=["causal", "window", "ranges", "mask of heads"],
    backend=["sdpa", "reference"],
)
def test_a_batch_of_output_gradients(scaling, mask, backend):
    """As torch.autograd.functional.jacobian(vectorize=True) and gradcheck(check_batched_grad=True) ask for."""
    leaves = operands()
    q, k, v, gain = leaves
    arguments = {"scaling": scaling, "gain": gain, "backend": backend, **MASKS[mask](2, 4, 7, 7)}
    out, aux = tritonattn.attention(q, k, v, return_aux=True, **arguments)
    for result in (tritonattn.attention(q, k, v, **arguments), out * aux.lse.nan_to_num(0, 0, 0)[..., None]):
        d_out = torch.randn(3, *result.shape, generator=torch.Generator().manual_seed(0))
        together = torch.autograd.grad(result, leaves, d_out, is_grads_batched=True, retain_graph=True)
        for i in range(3):
            one = torch.autograd.grad(result, leaves, d_out[i], retain_graph=True)
            for ours, expected in zip(together, one, strict=True):
                torch.testing.assert_close(ours[i], expected)


@pytest.mark.parametrize("masks", [{"causal": True}, {"window": (2, 0), "dropout_p": 0.3}])
def test_checkpointing(masks):
    torch.manual_seed(0)
    function = partial(objective, scaling="key_norm_sum", **masks)
    leaves = operands()
    torch.manual_seed(1)
    wanted = torch.autograd.grad(function(*leaves), leaves)
    torch.manual_seed(1)
    ours = torch.autograd.grad(checkpoint(function, *leaves, use_reentrant=False), leaves)
    for x, expected in zip(ours, wanted, strict=True):
        assert torch.equal(x, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo reads it
@in_turn(
    scaling=["sqrt_dim", "key_norm_mean"],
    masks=[{"causal": True}, {"window": (9, 0)}],
    transform=["grad", "vmap of grad"],
)
def test_a_compiled_transform_is_computed_as_uncompiled(transform, scaling, masks):
    """Dynamo's own rules give gradients of 0, others that are wrong, and raise."""
    random = torch.Generator().manual_seed(0)
    shapes = ((2, 1, 4, 40, 16), (2, 1, 2, 40, 16), (2, 1, 2, 40, 8))
    operands = [torch.randn(shape, generator=random) for shape in shapes]
    gradient = torch.func.grad(
        lambda *x: tritonattn.attention(*x, scaling=scaling, **masks).square().sum(), argnums=(0, 1, 2)
    )
    if transform == "grad":
        operands = [x[0] for x in operands]
    else:
        gradient = torch.func.vmap(gradient)
    torch._dynamo.reset()
    compiled, wanted = torch.compile(gradient, backend="aot_eager"), gradient(*operands)
    for _ in range(2):
        for ours, expected in zip(compiled(*operands), wanted, strict=True):
            torch.testing.assert_close(ours, expected)
    torch._dynamo.reset()
    message = "is not compiled" if TORCH > (2, 8) else "Observed exception"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
        torch.compile(gradient, backend="aot_eager", fullgraph=True)(*operands)


def test_compile_dynamic_shapes_do_not_recompile():
    function = partial(objective, causal=True, scaling="key_norm_mean")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (20, 40, 130, 700):
            assert_same_gradients(compiled, function, operands(length=length))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_with_dropout(randomness):
    q, k, v, _ = (x.detach() for x in operands())
    qs = torch.stack([q, q])

    def function(q):
        return tritonattn.attention(q, k, v, dropout_p=0.5)

    first, second = torch.func.vmap(function, randomness=randomness)(qs)
    assert torch.equal(first, second) == (randomness == "same")
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(function)(qs)


def test_compile_under_autocast_and_with_dropout():
    def function(q, k, v, gain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return objective(q, k, v, gain, window=(2, 1)).float()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*operands()), function(*operands()))
    dropped = torch.compile(partial(objective, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    dropped(*operands()).backward()


def test_compile_with_one_tensor_as_every_operand():
    x = torch.randn(1, 2, 7, 8, requires_grad=True)

    def function(x):
        return tritonattn.attention(x, x, x, scaling="key_norm_sum", causal=True).square().sum()

    assert_same_gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), function, (x,))


def test_compile_with_sizes_windows_and_numbers_that_change():
    def function(q, k, v, gain, left, factor):
        return objective(q, k, v, gain * factor, scaling="key_count", window=(left, 0))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length, left, factor in ((20, 2, 0.5), (40, 3, 0.7), (700, 5, 0.1)):
            settings = {"left": left, "factor": factor}
            assert_same_gradients(partial(compiled, **settings), partial(function, **settings), operands(length=length))


@in_turn(scaling=["sqrt_dim", "key_count", "key_norm_sum"], window=[(20, 0), (20, None), (None, 20)])
def test_export_of_a_window_wider_than_the_example(window, scaling):
    skip_where_export_binds_lengths(strict=False)

    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return tritonattn.attention(q, k, v, window=window, scaling=scaling, gain=torch.ones(q.shape[1], 1))

    length = {0: torch.export.Dim("batch", min=2, max=64), 2: torch.export.Dim("length", min=2, max=64)}
    program = torch.export.export(Layer(), tuple(x.detach() for x in operands()[:3]), dynamic_shapes=(length,) * 3)
    for size in (7, 60):
        leaves = tuple(x.detach() for x in operands(length=size)[:3])
        torch.testing.assert_close(program.module()(*leaves), Layer()(*leaves))
