"""The kernels of `batch_invariant` against float64: every mask and form; tests/invariance compares their bits."""

from typing import Any

import pytest
import torch

from tests.kernels import harness
from tests.kernels.harness import of_form
from tests.kernels.test_varlen import FEW, attend
from tests.kernels.test_varlen import MASKS as PACKED_MASKS
from tests.support.masks import MASKS
from tests.support.pairs import in_turn
from tritonattn.backends.triton import launch
from tritonattn.tuning.config import TileConfig

BOTH, BIAS = ("query_scale", "key_scale"), ("query_scale", "key_bias")


def _wide_ranges(batch: int, _: int, q_len: int, __: int) -> dict[str, Any]:
    row = torch.arange(q_len) - 1  # row 1 has 65 keys, more than are repeated; row 0's scale is 0
    return {"key_ranges": torch.stack([5 + row % 20, 70 - row % 9], -1).int().expand(batch, -1, -1)}


# Besides the masks of all tests, those that leave whole blocks visible between two edges.
WIDE_MASKS = {"wide window": lambda *_: {"window": (25, 20)}, "wide ranges": _wide_ranges}

pytestmark = pytest.mark.usefixtures("small_tiles")


@pytest.mark.slow
@in_turn(
    mask=[*WIDE_MASKS, *MASKS],
    form=["softcap aux", "aux", "sinks", "plain", "softcap"],
    scales=[(), BOTH, BIAS, ("key_bias",)],
    dtype=[torch.float16, torch.float32, torch.float32, torch.float32],
    heads=[(1, 2), (2, 1), (1, 3)],
    lengths=[(37, 70), (37, 70), (40, 18), (1, 17), (21, 35)],
    dims=[(16, 16), (17, 40)],
)
def test_every_mask(mask, form, scales, dtype, heads, lengths, dims, device):
    (kv_heads, group), (q_len, k_len), (head_dim, value_dim) = heads, lengths, dims
    sizes = {"kv_heads": kv_heads, "group": group, "q_len": q_len, "k_len": k_len}
    tensors, arguments = of_form(form, dtype, device, scales=scales, head_dim=head_dim, value_dim=value_dim, **sizes)
    masks = (MASKS | WIDE_MASKS)[mask](2, kv_heads * group, q_len, k_len)
    arguments |= {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in masks.items()}
    cancelling = 1.0 if q_len == 1 else 0.0  # a lone row with one key: its exact gradients are 0
    harness.check(tensors, summands=cancelling, scale=0.3, batch_invariant=True, **arguments)


@in_turn(
    mask=PACKED_MASKS, scaling=["cosine", "key_norm_sum", "sqrt_dim"], sinks=[(), ("sinks",)], bias=[("key_bias",), ()]
)
def test_packed_sequences(mask, scaling, sinks, bias, device):
    tensors = harness.packed_inputs(FEW, torch.float32, device, scales=("gain", *sinks, *bias), kv_heads=2)
    harness.check(tensors, attend(FEW, device), scaling=scaling, batch_invariant=True, **PACKED_MASKS[mask])


@pytest.fixture
def wide_steps(monkeypatch):
    """Tiles whose masked steps would be half as wide without `batch_invariant`."""
    tiles = {"forward": (16, 64), "grad_query": (16, 64), "row_terms": (16, 16), "grad_key_value": (64, 16)}
    default = launch.config_for

    def config(kernel, problem, target):
        return TileConfig(*tiles[kernel], 4, 1) if kernel in tiles else default(kernel, problem, target)

    monkeypatch.setattr(launch, "config_for", config)


def test_masked_steps_have_the_bits_of_others(device, wide_steps):
    """A row next to one with few keys, and keys in a block of which others are padding."""
    tensors = harness.inputs(torch.float32, device, batch=1, q_len=80, k_len=75)
    ranges = torch.tensor([0, 75], device=device).repeat(1, 80, 1)
    alone = harness.by_kernels(tensors, batch_invariant=True)
    ranges[:, ::2, 1] = 5
    mixed = harness.by_kernels(tensors, key_ranges=ranges, batch_invariant=True)
    for name in ("out", "q"):
        assert torch.equal(mixed[name][:, :, 1::2], alone[name][:, :, 1::2]), name
    padded = {name: torch.nn.functional.pad(tensors[name], (0, 0, 0, 7)) for name in "kv"}
    lengths = torch.tensor([75], device=device)
    found = harness.by_kernels(tensors | padded, key_lengths=lengths, batch_invariant=True)
    for name in "kv":
        assert torch.equal(found[name][:, :, :75], alone[name]), name
