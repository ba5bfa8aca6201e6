"""Bits of a sequence alone and with the rest of a batch on a CPU; `python -m perf invariance` runs many more cases."""

import pytest
import torch
from torch.nn.functional import pad

import tritonattn
from perf.soak.invariance_cases import cases, differences
from tests.support.calls import operands
from tests.support.masks import MASKS
from tests.support.refusals import refuses

CASES = list(cases(35, seed=1, lengths=(16, 300), dims=((64, 64), (20, 33))))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_do_not_depend_on_the_rest_of_the_batch(case):
    assert differences(case, "sdpa") == []


def test_the_switch_takes_a_bool():
    with pytest.raises(TypeError, match="enabled: expected a bool, got str 'x'"), tritonattn.batch_invariant("x"):
        pass


def test_without_the_switch_they_do():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 8, 300, 64)
    with tritonattn.batch_invariant():
        on = [tritonattn.attention(*(x[:1, :, :n] for x in (q, k, v)), causal=True) for n in (300, 211)]
        off = tritonattn.attention(q[:1, :, :211], k[:1, :, :211], v[:1, :, :211], causal=True, batch_invariant=False)
    assert torch.equal(on[0][:, :, :211], on[1])
    assert not torch.equal(off, on[1])
    decoded = [
        tritonattn.attention_decode(
            q[:1, :, n - 1 : n], k[:1], v[:1], key_lengths=torch.tensor([n]), batch_invariant=switch
        )
        for n, switch in ((211, True), (211, False))
    ]
    assert torch.equal(decoded[0][:, :, 0], on[0][:, :, 210])
    plain = tritonattn.attention(q[:1], k[:1], v[:1], causal=True)
    assert not torch.equal(decoded[1][:, :, 0], plain[:, :, 210])


@pytest.mark.parametrize(
    ("arguments", "named"), [({"dropout_p": 0.5}, "dropout_p"), ({"backend": "reference"}, "reference")]
)
def test_refusals(arguments, named):
    with pytest.raises(NotImplementedError, match=f"batch_invariant.*{named}"):
        tritonattn.attention(**operands(), batch_invariant=True, **arguments)
    refuses("TypeError: ~ batch_invariant", tritonattn.attention, **operands(), batch_invariant=1)


def test_a_bias_of_keys():
    torch.manual_seed(0)
    bias, grad = torch.randn(2, 4, 300), torch.randn(2, 4, 300, 32)
    q, k, v = torch.randn(2, 4, 300, 32), torch.randn(2, 2, 300, 32), torch.randn(2, 2, 300, 32)
    found = []
    for entries, n in ((slice(0, 2), 300), (slice(0, 1), 171)):
        operands = [x[entries, :, :n].clone().requires_grad_() for x in (q, k, v, bias)]
        lengths = {"key_lengths": torch.tensor([171, 300])} if n == 300 else {}
        upstream = grad[entries, :, :n].clone()
        upstream[0, :, 171:] = 0
        out = tritonattn.attention(*operands[:3], key_bias=operands[3], causal=True, batch_invariant=True, **lengths)
        found.append([x[0, :, :171] for x in (out, *torch.autograd.grad(out, operands, upstream))])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("scaling", ["key_norm_mean", "key_norm_sum"])
def test_gradients_of_one_key_head_that_many_query_heads_share(scaling):
    """Padded, packed and alone."""
    torch.manual_seed(0)
    settings = {"scaling": scaling, "causal": True, "batch_invariant": True}
    q, k, v, d_out = (torch.randn(heads, 221, 16) for heads in (8, 1, 1, 8))
    alone, pair = (slice(0, 151),), (slice(0, 151), slice(151, 221))
    found = []
    for documents in (alone, pair):
        leaves = [
            torch.stack([pad(x[:, rows], (0, 0, 0, 151 - x[:, rows].shape[1])) for rows in documents])
            for x in (q, k, v)
        ]
        leaves = [x.requires_grad_() for x in leaves]
        upstream = torch.stack([pad(d_out[:, rows], (0, 0, 0, 151 - d_out[:, rows].shape[1])) for rows in documents])
        lengths = {} if documents is alone else {"key_lengths": torch.tensor([151, 70])}
        out = tritonattn.attention(*leaves, **settings, **lengths)
        found.append([x[0] for x in torch.autograd.grad(out, leaves, upstream)])
    leaves = [x.transpose(0, 1).contiguous().requires_grad_() for x in (q, k, v)]
    ends = torch.tensor([0, 151, 221], dtype=torch.int32)
    out = tritonattn.attention_varlen(*leaves, ends, ends, 151, 151, **settings)
    packed = torch.autograd.grad(out, leaves, d_out.transpose(0, 1))
    found.append([x[:151].transpose(0, 1) for x in packed])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("mask", [name for name in MASKS if name != "everything"])
def test_results_and_gradients_are_those_of_the_definition(mask):
    torch.manual_seed(0)
    shapes = {"q": (2, 4, 40, 8), "k": (2, 2, 300, 8), "v": (2, 2, 300, 6), "query_scale": (2, 4, 40)}
    shapes |= {"key_scale": (2, 2, 300), "key_bias": (2, 4, 300), "sinks": (4,)}
    leaves = {name: torch.randn(shape, dtype=torch.float64).requires_grad_() for name, shape in shapes.items()}
    options = {"softcap": 3.0, "return_aux": True, **MASKS[mask](2, 4, 40, 300)}
    found = []
    for options_of in ({"backend": "sdpa", "batch_invariant": True}, {"backend": "reference"}):
        out, aux = tritonattn.scaled_attention(**leaves, **options, **options_of)
        lse = aux.lse.masked_fill(aux.lse.isneginf(), 0)
        found.append([out, *aux, *torch.autograd.grad(out.square().sum() + lse.sum(), list(leaves.values()))])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_a_patched_model_with_padding_on_the_left():
    """In a prefill and a step of `generate`, a padded row has the bits of its sequence alone, which has no mask."""
    pytest.importorskip("transformers")
    from tests.support.llama import llama
    from tritonattn.huggingface import attention_forward, patch
    from tritonattn.huggingface.masks import key_range_mask

    torch.manual_seed(0)
    model, padding, length = llama(), 37, 300
    module = model.model.layers[0].self_attn
    q, k, v = torch.randn(2, 4, length, 32), torch.randn(2, 2, length, 32), torch.randn(2, 2, length, 32)
    is_token = torch.ones(2, length, dtype=torch.bool)
    is_token[0, :padding] = False
    with patch(model, scaling="key_norm_mean", batch_invariant=True):
        for first in (0, length - 1):
            position = torch.arange(first, length)
            sizes = {"batch_size": 2, "q_length": length - first, "q_offset": first, "cache_position": position}
            mask = key_range_mask(**sizes, kv_length=length, attention_mask=is_token)
            batch, _ = attention_forward(module, q[:, :, first:], k, v, mask)
            rows = slice(max(first, padding), length)
            alone, _ = attention_forward(module, q[:1, :, rows], k[:1, :, padding:], v[:1, :, padding:], None)
            assert torch.equal(batch[:1, rows.start - first :], alone)


@pytest.mark.parametrize("scaling", ["key_norm_sum", "key_norm_max"])
def test_a_window_of_the_last_rows_with_padding_on_the_left(scaling):
    """The padding holds NaN; keys that left the window, one of them long, count in sums, as they do without padding."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 3, 16), 30 * torch.randn(2, 2, 300, 16), torch.randn(2, 2, 300, 16)
    k[:, :, :37], v[:, :, :37], k[:, :, 50] = torch.nan, torch.nan, 1e13
    options = {"scaling": scaling, "window": (90, 0), "batch_invariant": True, "return_aux": True}
    ranges = torch.tensor([37, 300]).expand(2, 3, 2)
    out, aux = tritonattn.attention(q, k, v, key_ranges=ranges, **options)
    alone, of_alone = tritonattn.attention(q, k[:, :, 37:], v[:, :, 37:], **options)
    assert all(map(torch.equal, (out, *aux), (alone, *of_alone)))


@pytest.mark.parametrize("scaling", ["key_norm_mean", "key_norm_rms", "key_norm_max", "cosine"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e30])
def test_keys_that_left_every_window_may_hold_anything(scaling, poison):
    """Alone, packed and decoded, 2 rows attend to the last 4 of 9 keys; and calls without rows or sequences."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    settings = {"scaling": scaling, "window": (2, 0), "batch_invariant": True}
    expected = tritonattn.attention(q.double(), k.double(), v.double(), **settings)
    dirty_k, dirty_v = (x.clone().index_fill_(2, torch.arange(5), poison).requires_grad_() for x in (k, v))
    out = tritonattn.attention(q, dirty_k, dirty_v, **settings)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    gradient = torch.autograd.grad(out.sum(), dirty_k)[0]
    assert gradient.isfinite().all()
    assert not gradient[:, :, :5].any()
    packed = [x[0].transpose(0, 1).detach() for x in (q, dirty_k, dirty_v)]
    q_ends, k_ends, none = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 2], [0, 9], [0]))
    assert torch.equal(
        tritonattn.attention_varlen(*packed, q_ends, k_ends, 2, 9, **settings).transpose(0, 1), out[0].detach()
    )
    for dtype, statistics in ((torch.int64, None), (torch.uint8, tritonattn.KeyStatistics(1, 2, 9))):
        if statistics is not None:
            statistics.append(dirty_k)
        lengths = torch.tensor([9], dtype=dtype)
        decoded = tritonattn.attention_decode(
            q, dirty_k.detach(), dirty_v.detach(), key_lengths=lengths, statistics=statistics, **settings
        )
        assert torch.equal(decoded, out.detach())
    assert tritonattn.attention(q[:, :, :0], k, v, **settings).shape == (1, 4, 0, 8)
    for ends in (none, torch.zeros(3, dtype=torch.int32)):  # rows and keys of no sequence
        assert not tritonattn.attention_varlen(*packed, ends, ends, 0, 0, **settings).any()
    pages, table = torch.randn(1, 16, 2, 8), torch.zeros(1, 0, dtype=torch.int32)
    for statistics in (None, tritonattn.PagedKeyStatistics(1, 16, 2)):  # rows that attend to no key
        given = {"block_table": table, "statistics": statistics, **settings}
        assert not tritonattn.attention_varlen(packed[0], pages, pages, q_ends, q_ends * 0, 2, 0, **given).any()


def test_kernels_refuse_scaled_gradients_of_fp16():
    from tritonattn.backends import BACKENDS
    from tritonattn.core.call import AttentionCall
    from tritonattn.core.terms import Terms
    from tritonattn.core.visibility import Visibility

    q = torch.ones(1, 1, 1, 8, dtype=torch.float16, requires_grad=True)
    call = AttentionCall(q, q, q, Visibility.of(q, q), Terms())
    refuse = BACKENDS["triton"].refuse_terms
    refuse(call)
    call = call.changed(terms=Terms(query_scale=torch.ones(1, 1, 1)))
    refuses("NotImplementedError: ~ batch_invariant ~ float16", refuse, call)
    q = q.detach()
    sinks, key_bias = torch.ones(1, requires_grad=True), torch.ones(1, 1, 1, 1, requires_grad=True)
    terms = Terms(query_scale=torch.ones(1, 1, 1), key_bias=key_bias, sinks=sinks)
    refuse(AttentionCall(q, q, q, Visibility.of(q, q), terms))
