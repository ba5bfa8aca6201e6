"""Passes over the ranges of rows: which keys are visible to some row, which rows attend to a block, the largest."""

import pytest
import torch
from torch import Tensor

from tests.support.masks import assert_rows_of_key_blocks, largest_keys, visible_pairs
from tritonattn.backends.triton import ranges, records
from tritonattn.core.sequences import Sequences
from tritonattn.core.visibility import Visibility

Q_LEN, K_LEN = 300, 325
LENGTHS = {"key_lengths": [70, 200]}
CASES = [
    {},
    {"causal": True},
    {"window": (9, 4)},
    LENGTHS,
    {"causal": True, "key_lengths": [325, 0]},
    {"window": (9, 4), **LENGTHS},
]


def example(extra: dict, with_ranges: bool, device: torch.device) -> tuple[Visibility, Tensor]:
    """A record on the device, and the pairs [B, Sq, Sk] that are visible."""
    random = torch.Generator().manual_seed(0)
    given = {name: torch.tensor(x) if isinstance(x, list) else x for name, x in extra.items()}
    if with_ranges:
        given["key_ranges"] = torch.randint(-3, K_LEN + 9, (2, Q_LEN, 2), generator=random, dtype=torch.int32)
        given["key_ranges"][0, :40, 1] = given["key_ranges"][0, :40, 0] + 2
        given["key_ranges"][1, :, 1].clamp_(max=K_LEN - 50)
        given["key_ranges"][1, :, 0].clamp_(min=50)
    pairs = visible_pairs((2, 1, Q_LEN, K_LEN), **given)[:, 0]
    on_device = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
    q, k = torch.empty(2, 1, Q_LEN, 16, device=device), torch.empty(2, 1, K_LEN, 16, device=device)
    return Visibility.of(q, k, **on_device), pairs


@pytest.mark.parametrize("extra", CASES, ids=str)
def test_rows_of_key_blocks(extra, device):
    visibility, pairs = example(extra, True, device)
    bounds = ranges.rows_of_key_blocks(visibility, records.view_of(visibility), 16)
    assert_rows_of_key_blocks(bounds, pairs, 16)


@pytest.mark.parametrize("with_ranges", [False, True])
@pytest.mark.parametrize("extra", CASES, ids=str)
def test_seen_keys(extra, with_ranges, device):
    visibility, pairs = example(extra, with_ranges, device)
    assert torch.equal(ranges.seen_keys(visibility)[:, 0].cpu(), pairs.any(1))


def test_torch_finds_seen_keys_of_masks_packings_and_caches(device):
    """A mask, packed sequences, and a cache, whose rows stand at the end of its lengths."""
    mask = torch.arange(9, device=device) % 3 == 1
    q, k = torch.empty(1, 1, 2, 16, device=device), torch.empty(1, 1, 9, 16, device=device)
    packed = Sequences(*(torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 1, 2], [0, 2, 6])), 1, 4)
    cache = Visibility.of_padded((1, 1, 1, 2, 9), q.device, torch.tensor([5], device=device), left=1)
    for visibility, expected in (
        (Visibility.of(q, k, mask=mask), [1, 4, 7]),
        (Visibility.of(q, k, causal=True, sequences=packed), [0, 1, 2, 3, 4, 5]),
        (cache, [2, 3, 4]),
    ):
        assert ranges.seen_keys(visibility).flatten().nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("with_ranges", [False, True])
@pytest.mark.parametrize("extra", CASES, ids=str)
def test_largest_of_ranges(extra, with_ranges, device):
    """The lowest key of ties, the first NaN, 0 and inf among them; bounds for all entries, or for each."""
    visibility, pairs = example(extra, with_ranges, device)
    x = torch.randint(0, 9, (2, 3, K_LEN), generator=torch.Generator().manual_seed(1)) / 4
    x[1, 1, 30::40], x[1, 2, 7::90], x[0, 2] = torch.inf, torch.nan, 0
    x[:, 0] = torch.arange(K_LEN)  # ends of ranges tell, as few levels do not: each is met within some keys
    x[0, 1] = x[0, 0].flip(0)
    lo, hi = visibility.ranges()
    found = ranges.argmax_over_ranges(x.to(device), lo[:, None], hi[:, None]).cpu()
    expected = largest_keys(x, pairs[:, None])
    has_keys = pairs.any(-1)[:, None].expand_as(found)
    assert torch.equal(found[has_keys], expected[has_keys])
    if not with_ranges:
        assert (found.diff() >= 0).all()  # also of rows without keys
    assert ((found >= 0) & (found < K_LEN)).all()
