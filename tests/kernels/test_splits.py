"""Keys of few rows, and rows of few key heads, shared out among programs, whose parts are joined."""

from dataclasses import replace

import pytest
import torch

import tritonattn
from tests.kernels import harness
from tests.kernels.harness import of_form
from tests.kernels.test_pages import CASES, ROWS
from tests.kernels.test_varlen import MASKS as PACKED_MASKS
from tests.kernels.test_varlen import PACKED, attend
from tests.support.masks import MASKS
from tests.support.pages import paged_call
from tests.support.pairs import in_turn
from tritonattn.backends import triton as triton_backend
from tritonattn.backends.triton import attention, grids, launch
from tritonattn.core import rounding
from tritonattn.tuning.config import Target

SPLITS = 3
BOTH, BIAS = ("query_scale", "key_scale"), ("query_scale", "key_bias")


@pytest.fixture
def in_splits(monkeypatch, small_tiles, launched):
    """Three splits of every call, joined two at a time; the kernels that ran."""
    for name in ("splits_of_keys", "splits_of_rows"):
        monkeypatch.setattr(grids, name, lambda *sizes: SPLITS)
    tiles = launch.config_for

    def config(kernel, problem, target):
        chosen = tiles(kernel, problem, target)
        return replace(chosen, block_n=2) if kernel == "combine_splits" else chosen

    monkeypatch.setattr(launch, "config_for", config)
    monkeypatch.setattr(attention, "_kept", attention._kept.__wrapped__)
    return launched


@pytest.mark.slow
@in_turn(
    mask=[*MASKS, "full"],
    form=["softcap aux", "sinks dropout", "everything", "plain", "sinks"],
    scales=[BIAS, ("query_scale",), (), BOTH],
    dtype=[torch.float16, torch.float32, torch.float32],
    heads=[(1, 2), (2, 1), (1, 5)],
    lengths=[(21, 100), (100, 21), (37, 60)],
    dims=[(16, 16), (17, 40), (24, 16)],
)
def test_every_mask(mask, form, scales, dtype, heads, lengths, dims, device, in_splits):
    """Also where splits are empty, begin inside a head's rows, or have several heads."""
    (kv_heads, group), (q_len, k_len), (head_dim, value_dim) = heads, lengths, dims
    sizes = {"kv_heads": kv_heads, "group": group, "q_len": q_len, "k_len": k_len, "batch": 1}
    tensors, arguments = of_form(form, dtype, device, scales=scales, head_dim=head_dim, value_dim=value_dim, **sizes)
    arguments = arguments | harness.mask(mask, device, 1, kv_heads * group, q_len, k_len)
    harness.check(tensors, scale=0.3, **arguments)
    names = [name for name, _ in in_splits]
    assert names.count("combine_splits") == 1
    assert names.count("sum_of_splits") == 2 + sum(name.startswith("key_") for name in scales)


@pytest.mark.usefixtures("in_splits")
@pytest.mark.parametrize("mask", PACKED_MASKS)
def test_packed_sequences(mask, device):
    tensors = harness.packed_inputs(PACKED, torch.float32, device, scales=("gain", "sinks"))
    harness.check(tensors, attend(PACKED, device), return_aux=True, **PACKED_MASKS[mask])


@pytest.mark.parametrize("name", list(CASES)[1:])
def test_pages(name, device, in_splits):
    """The bits of the same call over packed keys, which `test_packed_sequences` holds to the bound."""
    page, form = CASES[name]
    calls = paged_call(ROWS, torch.float32, page, causal=True, device=device, **form)
    found, expected = (triton_backend.forward(call, aux=True) for call in calls)
    assert all(map(torch.equal, found, expected))
    assert [kernel for kernel, _ in in_splits] == ["attention_forward", "combine_splits"] * 2


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # NaN fails the bound
@pytest.mark.usefixtures("in_splits")
def test_parts_whose_weights_no_fp32_would_hold_together(device):
    """The last split has no keys; others have logits of hundreds."""
    tensors = harness.inputs(torch.float32, device, batch=1, k_len=60)
    harness.check(tensors, scale=40.0, return_aux=True, gradients=False)


@pytest.mark.usefixtures("in_splits")
def test_neighbours_change_nothing(device):
    """All bits of an entry are those of a batch of one."""
    tensors = harness.inputs(torch.float16, device, batch=3, k_len=70, scales=("query_scale", "key_scale"))
    d_out = torch.randn(tensors["q"].shape, generator=torch.Generator().manual_seed(5)).to(tensors["q"])
    whole = harness.by_kernels(tensors, d_out=d_out, causal=True)
    for b in range(3):
        one = {name: x[b : b + 1].clone() for name, x in tensors.items()}
        found = harness.by_kernels(one, d_out=d_out[b : b + 1], causal=True)
        harness.assert_same(found, {name: x[b : b + 1] for name, x in whole.items()})


@pytest.mark.usefixtures("in_splits")
def test_a_gradient_in_fp32_is_the_sum_of_the_parts(device):
    """Under a second term of k, to which the first one's gradient is added in fp32: `fp32_grad_k`."""
    tensors = harness.inputs(torch.float16, device, k_len=70)
    harness.check(tensors, tritonattn.attention, scaling="key_norm_mean", causal=True)


@pytest.mark.usefixtures("in_splits")
def test_what_rounding_takes_is_kept(device, monkeypatch):
    """From the joined row, in 256ths of its last place; the joined row itself is recomputed up to one of them."""
    run, joined = launch.run, {}

    def watch(kernel, grid, arguments, config):
        joined.update(arguments if kernel.__name__ == "combine_splits" else {})
        run(kernel, grid, arguments, config)

    monkeypatch.setattr(launch, "run", watch)
    _, call = paged_call(ROWS, torch.float16, 16, causal=True, device=device)
    kept = torch.zeros(call.q.shape, dtype=torch.int8, device=device)
    out = triton_backend.forward(call, aux=False, rounding=kept).out
    weights = joined["parts"].lse.softmax(0).nan_to_num(0.0)[..., None]
    lost = rounding.lost_in_rounding((weights * joined["parts"].out).sum(0), out)
    assert (kept.int() - lost.int()).abs().max() <= 2 < 50 < lost.int().abs().max()


def test_batch_invariant_rows_have_no_splits(device, in_splits):
    tensors = harness.inputs(torch.float32, device, k_len=100, batch=1)
    harness.check(tensors, batch_invariant=True)
    assert [name for name, _ in in_splits] == [
        "attention_forward",
        "attention_row_terms",
        "attention_grad_query",
        "attention_grad_key_value",
    ]


def counts_of(q_shape: tuple[int, ...], kv_heads: int, k_len: int, **options) -> list[int | None]:
    """The splits of the forward kernel, and of grad_key_value, in a call on an H100."""
    q = torch.empty(q_shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
    k = torch.empty(q_shape[0], kv_heads, k_len, q_shape[3], dtype=torch.bfloat16, device="meta", requires_grad=True)
    with launch.recording(Target.parse("sm_90")) as launches:
        out = tritonattn.attention(q, k, k, **options, backend="triton")
        out.backward(torch.empty_like(out))
    return [one.arguments["splits"] for one in launches if "splits" in one.arguments and "NUM_XCDS" in one.arguments]


def test_the_batch_has_no_say():
    """Rows, keys and the card have, and of gradients also the heads."""
    assert counts_of((1, 32, 128, 64), 8, 8192) == counts_of((9, 32, 128, 64), 8, 8192) == [8, None]
    assert counts_of((1, 4, 128, 64), 2, 8192)[0] == counts_of((1, 64, 128, 64), 8, 8192)[0] == 8
    assert counts_of((1, 32, 2048, 64), 1, 2048) == counts_of((9, 32, 2048, 64), 1, 2048) == [None, 8]
    assert counts_of((1, 32, 2048, 64), 1, 2048, causal=True) == [None, 16]
    assert counts_of((1, 32, 2048, 64), 8, 2048) == [None, None]
    assert counts_of((1, 4, 2048, 64), 4, 2048) == [None, None], "too few rows of a key head"


def test_few_keys_and_many_rows_are_not_split():
    assert counts_of((1, 32, 128, 64), 32, 1024)[0] is None
    assert counts_of((1, 32, 1025, 64), 32, 8192)[0] is None
    assert counts_of((1, 32, 128, 64), 32, 8192, window=(500, 0))[0] is None
    assert counts_of((1, 32, 128, 64), 32, 8192, window=(4000, 0))[0] == 7
    assert counts_of((1, 32, 128, 64), 32, 8192, batch_invariant=True) == [None, None]
