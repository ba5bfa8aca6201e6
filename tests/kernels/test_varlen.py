"""attention_varlen by the kernels: sequences of every length, each as if alone."""

from functools import partial

import pytest
import torch

import tritonattn
from tests.kernels import harness
from tests.support.packed import Packed
from tests.support.pairs import pairwise

pytestmark = pytest.mark.usefixtures("small_tiles")

# Tiles are 16 x 16: several of them, one, parts of one; no rows, no keys, more rows than keys; ends of no sequence.
PACKED = Packed((19, 0, 35, 1, 16, 3), (19, 4, 0, 33, 16, 18), q_tail=5, k_tail=17)
FEW = Packed((18, 0, 5), (20, 3, 17), q_tail=1, k_tail=2)
MASKS: dict[str, dict] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (5, 2)},
    "causal window": {"causal": True, "window": (7, None)},
}
EVERYTHING = {"softcap": 1.5, "dropout_p": 0.3, "return_aux": True}


def attend(packed: Packed, device: torch.device):
    return partial(tritonattn.attention_varlen, **packed.arguments(device))


@pytest.mark.slow
@pairwise(
    free=[("scaling", "mask"), ("scaling", "form"), ("scaling", "heads")],
    scaling=["sqrt_dim", "log_key_count", "key_norm_sum", "key_norm_max", "cosine"],
    mask=MASKS,
    form=["softcap", "sinks dropout", "everything"],
    bias=[(), ("key_bias",)],
    dtype=[torch.float32, torch.float16],
    heads=[(1, 2), (2, 1), (1, 3)],
    dims=[(16, 16), (17, 40)],
)
def test_every_pair_of_choices(scaling, mask, form, bias, dtype, heads, dims, device):
    arguments = dict(harness.FORMS[form])
    sinks = (arguments.pop("sinks"),) if "sinks" in arguments else ()
    sizes = {"kv_heads": heads[0], "group": heads[1], "head_dim": dims[0], "value_dim": dims[1]}
    tensors = harness.packed_inputs(FEW, dtype, device, scales=("gain", *sinks, *bias), **sizes)
    harness.check(tensors, attend(FEW, device), scaling=scaling, **arguments, **MASKS[mask])


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask, device):
    tensors = harness.packed_inputs(PACKED, torch.float32, device, group=1)
    harness.check(tensors, attend(PACKED, device), **MASKS[mask])


@pytest.mark.parametrize(
    "packed",
    [Packed((), (), 3, 4), Packed((0, 0), (3, 2)), Packed((5, 2), (0, 0), 0, 3), Packed((0, 7), (5, 0), 2, 2)],
    ids=str,
)
def test_rows_without_keys(packed, device):
    tensors = harness.packed_inputs(packed, torch.float32, device)
    found = harness.by_kernels(tensors, attend(packed, device), causal=True, return_aux=True)
    assert (found["lse"] == -torch.inf).all()
    assert (found["max_logit"] == -torch.inf).all()
    for name in ("out", "entropy", "q", "k", "v"):
        assert (found[name] == 0).all(), name


@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value")  # the interpreter's
@pytest.mark.parametrize("scaling", ["log_key_count", "key_norm_mean", "key_norm_l2", "key_norm_max"])
def test_nan_in_a_sequence_stays_there(scaling, device):
    tensors = harness.packed_inputs(FEW, torch.float32, device, group=1, scales=("gain", "sinks"))
    arguments = {"causal": True, "scaling": scaling, **EVERYTHING}
    clean = harness.by_kernels(tensors, attend(FEW, device), **arguments)
    rows, keys = FEW.sequences()[0]
    for name, index in {"q": rows, "k": keys, "v": keys}.items():
        tensors[name][index] = torch.nan
    found = harness.by_kernels(tensors, attend(FEW, device), **arguments)
    for name in ("out", "q", "k", "v"):
        behind = slice((keys if name in "kv" else rows).stop, None)
        assert torch.equal(found[name][behind], clean[name][behind]), name
    for name in ("lse", "max_logit", "entropy"):
        assert torch.equal(found[name][:, rows.stop :], clean[name][:, rows.stop :]), name


def test_neighbours_change_nothing(device):
    """A sequence has the same bits alone and between others, wherever it starts."""
    tensors = harness.packed_inputs(FEW, torch.float32, device, scales=("gain",))
    arguments = {"causal": True, "scaling": "key_count"}
    d_out = torch.randn(tensors["q"].shape, generator=torch.Generator().manual_seed(5)).to(device)
    whole = harness.by_kernels(tensors, attend(FEW, device), d_out, **arguments)
    for sequence in (0, 2):
        rows, keys = FEW.sequences()[sequence]
        part = {"q": rows, "k": keys, "v": keys}
        one = {name: tensors[name][index].clone() for name, index in part.items()}
        one["gain"] = tensors["gain"][:, rows].clone()
        alone = Packed((rows.stop - rows.start,), (keys.stop - keys.start,))
        found = harness.by_kernels(one, attend(alone, device), d_out[rows], **arguments)
        expected = {name: whole[name][index] for name, index in {"out": rows, **part}.items()}
        harness.assert_same(found, expected | {"gain": whole["gain"][:, rows]})
