"""torch.compile and torch.export over attention and attention_varlen: one graph, gradients, sizes that change."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import tritonattn
from tests.support.masks import MASKS
from tests.support.packed import Packed, offsets, packed_operands
from tests.support.versions import TORCH

pytestmark = [
    # of torch, while it compiles or falls back
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script"),
]


def operands(batch: int = 2, length: int = 7) -> tuple[Tensor, ...]:
    """q, k, v, a gain and sinks, fp32."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, 4, length, 8), (batch, 2, length, 8), (batch, 2, length, 6), (4, 1), (4,))
    return tuple(torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)


def packed_leaves(packed: Packed) -> tuple[Tensor, ...]:
    return *packed_operands(packed, torch.float32).values(), *operands()[3:]


def objective(q, k, v, gain, sinks=None, function=tritonattn.attention, **arguments) -> Tensor:
    out, aux = function(q, k, v, gain=gain, sinks=sinks, return_aux=True, **arguments)
    return out.square().sum() + torch.where(aux.lse == -torch.inf, 0, aux.lse).sin().sum()


def assert_same_gradients(function, like, leaves: tuple[Tensor, ...]) -> None:
    results = []
    for run in (function, like):
        torch.manual_seed(1)
        results.append(torch.autograd.grad(run(*leaves), leaves))
    torch.testing.assert_close(*results)


def assert_compiles(function, *calls: tuple[tuple[Tensor, ...], dict[str, Any]], **options) -> None:
    """All calls run in the graph of the first one, with the gradients that they have uncompiled."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", **options)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for leaves, arguments in calls:
            assert_same_gradients(partial(compiled, **arguments), partial(function, **arguments), leaves)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def test_every_mask_bias_and_number_at_once():
    def function(q, k, v, gain, sinks, of_keys, of_pairs, of_distances):
        biases = {"key_bias": of_keys, "bias": of_pairs, "relative_bias": of_distances, "relative_right": 2}
        options = {"scaling": "key_norm_rms", "softcap": 3.0, "bias_after_softcap": True}
        return objective(q, k, v, gain, sinks, **options, **biases, **masks)

    masks, shapes = MASKS["everything"](2, 4, 7, 7), ((2, 2, 7), (1, 4, 1, 7), (1, 4, 1, 5))
    biases = (torch.randn(shape, requires_grad=True) for shape in shapes)
    assert_compiles(function, ((*operands(), *biases), {}))


@torch.no_grad()
def test_a_sum_of_key_norms_without_a_graph():
    def function(q, k, v, gain):
        return tritonattn.attention(q, k, v, scaling="key_norm_mean", gain=gain, key_lengths=lengths)

    lengths, given = torch.tensor([3, 7]), operands()[:4]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), function(*given))


@pytest.mark.slow
def test_under_autocast_with_dropout():
    def function(q, k, v, gain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return objective(q, k, v, gain, scaling="key_norm_max", dropout_p=0.5, **ranges).float()

    ranges = MASKS["ranges"](2, 4, 7, 7)
    assert_compiles(function, (operands()[:4], {}))


@pytest.mark.slow
def test_the_reference():
    function = partial(objective, backend="reference", scaling="cosine", causal=True)
    assert_compiles(function, (operands()[:4], {}))


@pytest.mark.slow
def test_causal_calls_of_any_length_and_number():
    def function(q, k, v, gain, factor):
        return tritonattn.attention(q, k, v, scaling="key_count", gain=gain * factor, causal=True).square().sum()

    calls = ((operands(length=length)[:4], {"factor": factor}) for length, factor in ((20, 0.5), (130, 0.1)))
    assert_compiles(function, *calls, dynamic=True)


@pytest.mark.slow
def test_packed_sequences_of_any_lengths():
    check_packed_sequences_of_any_lengths("key_count")


def check_packed_sequences_of_any_lengths(scaling: str) -> None:
    def function(q, k, v, gain, sinks, **sequences):
        options = {"scaling": scaling, "window": (3, 0)}
        return objective(q, k, v, gain, sinks, tritonattn.attention_varlen, **options, **sequences)

    calls = [Packed(lengths, lengths[::-1]) for lengths in ((3, 4, 2, 5), (9, 2, 4, 4, 5, 1, 1, 3, 7))]
    assert_compiles(function, *((packed_leaves(packed), packed.arguments()) for packed in calls), dynamic=True)


@pytest.mark.parametrize(
    ("strict", "learns", "options"),
    [
        (True, True, {"causal": True, "scaling": "key_norm_mean"}),
        (False, True, {"causal": True, "scaling": "key_norm_max"}),
        (False, True, {"window": (20, None), "scaling": "key_count"}),  # wider than the example
        (False, True, {"window": (None, 20), "scaling": "key_norm_sum"}),
        (False, False, {}),
    ],
    ids=str,
)
def test_export(options, learns, strict):
    """The parameters of the layer require gradients, as those of a new layer do, or do not."""
    if not strict and TORCH < (2, 13):  # where key heads are shared or rows are packed
        pytest.skip("this torch exports free lengths with strict=True only")

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = torch.nn.Linear(8, 64)

        def forward(self, x, gain):
            q, k, v = self.project(x).unflatten(-1, (8, 8)).transpose(1, 2).split((4, 2, 2), 1)
            return tritonattn.attention(q, k, v, gain=gain, **options)

    layer, gain = Layer().requires_grad_(learns), torch.randn(4, 1)
    lengths = torch.export.Dim("length", min=4 if strict else 2, max=512)
    sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: lengths}
    program = torch.export.export(layer, (torch.randn(2, 7, 8), gain), strict=strict, dynamic_shapes=(sizes, None))
    for batch, length in ((2, 7), (3, 200)):
        x = torch.randn(batch, length, 8)
        torch.testing.assert_close(program.module()(x, gain), layer(x, gain))
    if "window" in options:
        assert torch.ops.tritonattn.forward.default in {node.target for node in program.graph.nodes}


@pytest.mark.slow
def test_export_of_packed_sequences():
    class Layer(torch.nn.Module):
        def forward(self, *tensors):
            return tritonattn.attention_varlen(*tensors, 16, 16, scaling="key_norm_mean", causal=True)

    def arguments(packed: Packed) -> tuple[Tensor, ...]:
        leaves = (x.detach() for x in packed_operands(packed, torch.float32).values())
        return *leaves, offsets(packed.q_lengths), offsets(packed.k_lengths)

    first, second = Packed((3, 4, 2), (4, 5, 2)), Packed((5, 1, 7, 3, 0), (2, 2, 9, 4, 1))
    rows, keys, starts = ({0: torch.export.Dim(name, min=3, max=64)} for name in ("rows", "keys", "starts"))
    shapes = ((rows, keys, keys, starts, starts),)
    program = torch.export.export(Layer(), arguments(first), strict=TORCH < (2, 13), dynamic_shapes=shapes)
    for packed in (first, second):
        torch.testing.assert_close(program.module()(*arguments(packed)), Layer()(*arguments(packed)))
