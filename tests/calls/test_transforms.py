"""torch.func, batched gradients and checkpointing over attention and attention_varlen."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tritonattn
from tests.calls.test_compile import objective, operands
from tests.support.calls import TYPICAL
from tests.support.masks import MASKS
from tests.support.packed import Packed, offsets, packed_operands
from tests.support.pairs import pairwise

pytestmark = [
    # of torch, while it falls back
    pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:torch.searchsorted")
]


@pairwise(scaling=["log_key_count", "key_norm_max", "cosine"], mask=MASKS)
def test_func_grad_and_vmap_of_it(scaling, mask):
    function = partial(objective, scaling=scaling, **MASKS[mask](2, 4, 7, 7))
    gradient = torch.func.grad(function, argnums=(0, 1, 2, 3))
    leaves = operands()[:4]
    plain = torch.autograd.grad(function(*leaves), leaves)
    for ours, expected in zip(gradient(*(x.detach() for x in leaves)), plain, strict=True):
        torch.testing.assert_close(ours, expected)
    mapped = tuple(torch.stack([x.detach(), 2 * x.detach()]) for x in leaves)
    together = torch.func.vmap(gradient)(*mapped)
    for i in range(2):
        for ours, expected in zip(together, gradient(*(x[i] for x in mapped)), strict=True):
            torch.testing.assert_close(ours[i], expected, rtol=1e-4, atol=1e-5)


def test_vmap_over_some_operands_masks_and_other_axes():
    q, k, v = (x.detach() for x in operands()[:3])
    lengths = torch.tensor([[1, 2], [3, 4], [7, 0]])
    masks = torch.rand(3, 2, 1, 7, 7, generator=torch.Generator().manual_seed(0)) > 0.4
    biases = torch.randn(3, 2, 2, 7, generator=torch.Generator().manual_seed(1))

    def function(q, lengths, mask, bias):
        masks = {"key_lengths": lengths, "mask": mask}
        return tritonattn.attention(q, k, v, scaling="key_norm_sum", key_bias=bias, **masks)

    wanted = torch.stack([function(i * q, lengths[i], masks[i], biases[i]) for i in range(3)])
    qs = torch.stack([i * q for i in range(3)], dim=3)
    mapped = torch.func.vmap(function, in_dims=(3, 0, 0, 0), out_dims=1)(qs, lengths, masks, biases)
    torch.testing.assert_close(mapped, wanted.movedim(0, 1))


def test_vmap_over_biases_of_pairs_and_gradients_of_one_that_entries_share():
    q, k, v = (x.detach() for x in operands()[:3])
    generator = torch.Generator().manual_seed(1)
    biases, tables = torch.randn(3, 7, 7, generator=generator), torch.randn(3, 1, 4, 1, 5, generator=generator)

    def function(bias, table):
        return tritonattn.attention(q, k, v, bias=bias, relative_bias=table, relative_right=1).square().sum()

    gradient = torch.func.grad(function, argnums=(0, 1))
    for dims in ((0, 0), (0, None), (None, 0)):
        given = [x if dim == 0 else x[0] for x, dim in zip((biases, tables), dims, strict=True)]
        together = torch.func.vmap(gradient, in_dims=dims)(*given)
        for i in range(3):
            chosen = [x[i] if dim == 0 else x for x, dim in zip(given, dims, strict=True)]
            leaves = [x.clone().requires_grad_() for x in chosen]
            expected = torch.autograd.grad(function(*leaves), leaves)
            for ours, theirs in zip(together, expected, strict=True):
                torch.testing.assert_close(ours[i], theirs)


@pairwise(
    scaling=["key_norm_mean", "log_key_count", "key_norm_max", "cosine"],
    mask=["causal", "window", "ranges", "mask of heads"],
    backend=["sdpa", "reference"],
)
def test_a_batch_of_output_gradients(scaling, mask, backend):
    """As torch.autograd.functional.jacobian(vectorize=True) and gradcheck(check_batched_grad=True) ask for."""
    leaves = operands()[:4]
    q, k, v, gain = leaves
    arguments = {"scaling": scaling, "gain": gain, "backend": backend, **MASKS[mask](2, 4, 7, 7)}
    out, aux = tritonattn.attention(q, k, v, return_aux=True, **arguments)
    for result in (tritonattn.attention(q, k, v, **arguments), out * aux.lse.nan_to_num(0, 0, 0)[..., None]):
        d_out = torch.randn(2, *result.shape, generator=torch.Generator().manual_seed(0))
        together = torch.autograd.grad(result, leaves, d_out, is_grads_batched=True, retain_graph=True)
        for i in range(2):
            one = torch.autograd.grad(result, leaves, d_out[i], retain_graph=True)
            for ours, expected in zip(together, one, strict=True):
                torch.testing.assert_close(ours[i], expected)


@pytest.mark.parametrize("masks", [{"causal": True}, {"window": (2, 0), "dropout_p": 0.3}])
def test_checkpointing(masks):
    function, leaves, results = partial(objective, scaling="key_norm_sum", **masks), operands(), []
    for run in (function, partial(checkpoint, function, use_reentrant=False)):
        torch.manual_seed(1)
        results.append(torch.autograd.grad(run(*leaves), leaves))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_with_dropout(randomness):
    q, k, v = (x.detach() for x in operands()[:3])
    qs = torch.stack([q, q])

    def function(q):
        return tritonattn.attention(q, k, v, dropout_p=0.5)

    first, second = torch.func.vmap(function, randomness=randomness)(qs)
    assert torch.equal(first, second) == (randomness == "same")
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(function)(qs)


@pytest.mark.parametrize("scaling", TYPICAL)
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
