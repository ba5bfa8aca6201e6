"""attention_varlen under torch.compile, export, torch.func, autocast and checkpointing."""

from functools import partial

import pytest
import torch
from torch import Tensor

import tritonattn
from tests.calls.test_transforms import MODES, assert_same_gradients
from tests.support.packed import RAGGED, Packed, offsets, packed_operands
from tests.support.pairs import in_turn
from tests.support.versions import skip_where_export_binds_lengths

pytestmark = [
    # torch's own, while it compiles or falls back
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script"),
    pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:torch.searchsorted"),
]


def operands(packed: Packed = RAGGED) -> tuple[Tensor, ...]:
    """q, k, v, a gain and sinks, fp32."""
    generator = torch.Generator().manual_seed(0)
    gain, sinks = (torch.randn(shape, generator=generator).requires_grad_() for shape in ((4, 1), (4,)))
    return *packed_operands(packed, torch.float32).values(), gain, sinks


def objective(q, k, v, gain, sinks, packed: Packed = RAGGED, **arguments) -> Tensor:
    out, aux = tritonattn.attention_varlen(
        q, k, v, **packed.arguments(), gain=gain, sinks=sinks, return_aux=True, **arguments
    )
    return out.square().sum() + torch.where(aux.lse == -torch.inf, 0, aux.lse).sin().sum()


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@in_turn(scaling=["sqrt_dim", "key_norm_max"], masks=[{}, {"causal": True}])  # windows and sums are below
def test_compile_forward_and_backward_in_one_graph(scaling, masks):
    function = partial(objective, scaling=scaling, **masks)
    assert_same_gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), function, operands())


def test_compile_once_for_any_lengths():
    def function(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        return (
            tritonattn.attention_varlen(
                q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scaling="key_norm_sum", window=(3, 0)
            )
            .square()
            .sum()
        )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((3, 4, 2, 5), (5, 2, 7, 3, 6, 1), (9, 2, 4, 4, 5, 1, 1, 3, 7)):  # no size equals another
            packed = Packed(lengths, lengths[::-1])
            given = packed.arguments()
            leaves = tuple(packed_operands(packed, torch.float32).values())
            assert_same_gradients(partial(compiled, **given), partial(function, **given), leaves)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    skip_where_export_binds_lengths(strict)

    class Layer(torch.nn.Module):
        def forward(self, q, k, v, cu_seqlens_q, cu_seqlens_k):
            return tritonattn.attention_varlen(
                q,
                k,
                v,
                cu_seqlens_q,
                cu_seqlens_k,
                16,
                16,
                scaling="key_norm_mean",
                causal=True,
                batch_invariant=not strict,
            )

    def arguments(packed: Packed) -> tuple[Tensor, ...]:
        leaves = (x.detach() for x in packed_operands(packed, torch.float32).values())
        return *leaves, offsets(packed.q_lengths), offsets(packed.k_lengths)

    rows, keys, members = (torch.export.Dim(name, min=3, max=64) for name in ("rows", "keys", "members"))
    shapes = ({0: rows}, {0: keys}, {0: keys}, {0: members}, {0: members})
    program = torch.export.export(
        Layer(), arguments(Packed((3, 4, 2), (4, 5, 2))), strict=strict, dynamic_shapes=shapes
    )
    for packed in (Packed((3, 4, 2), (4, 5, 2)), Packed((5, 1, 7, 3, 0), (2, 2, 9, 4, 1))):
        given = arguments(packed)
        torch.testing.assert_close(program.module()(*given), Layer()(*given))


@pytest.mark.parametrize("scaling", MODES)
def test_vmap_over_the_offsets(scaling):
    q, k, v = (x.detach() for x in packed_operands(Packed((7,), (9,)), torch.float32).values())
    rows = torch.stack([offsets(lengths) for lengths in ((3, 4), (7, 0), (1, 5))])
    keys = torch.stack([offsets(lengths) for lengths in ((4, 5), (0, 9), (8, 1))])

    def function(cu_seqlens_q, cu_seqlens_k):
        return tritonattn.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, 7, 9, scaling=scaling, causal=True)

    wanted = torch.stack([function(*pair) for pair in zip(rows, keys, strict=True)])
    torch.testing.assert_close(torch.func.vmap(function)(rows, keys), wanted)
    of_rows = torch.stack([function(x, keys[0]) for x in rows])
    torch.testing.assert_close(torch.func.vmap(function, in_dims=(0, None))(rows, keys[0]), of_rows)


def test_offsets_that_a_transform_hides_are_put_in_order():
    """Unread offsets, as on a GPU, act as if clamped and never falling; nothing outside is read."""
    leaves = [x.detach() for x in packed_operands(Packed((9,), (9,))).values()]
    wild, tame = torch.tensor([3, 12, -5, 40]).int(), torch.tensor([0, 9, 9, 9]).int()

    def gradients(offsets):
        def function(q, k, v):
            return (
                tritonattn.attention_varlen(q, k, v, offsets, offsets, 9, 9, scaling="key_norm_max", window=(2, 3))
                .square()
                .sum()
            )

        return torch.func.grad(function, argnums=(0, 1, 2))(*leaves)

    for ours, expected in zip(
        torch.func.vmap(gradients)(wild[None]), torch.func.vmap(gradients)(tame[None]), strict=True
    ):
        assert torch.equal(ours, expected)


def test_compile_with_one_tensor_for_both_offsets():
    packed = Packed((3, 4), (3, 4))

    def function(q, k, v, ends):
        return tritonattn.attention_varlen(q, k, v, ends, ends, 4, 4, causal=True).square().sum()

    leaves, ends = tuple(packed_operands(packed, torch.float32).values()), offsets((3, 4))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_gradients(partial(compiled, ends=ends), partial(function, ends=ends), leaves)
