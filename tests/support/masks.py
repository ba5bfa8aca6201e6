"""One example of every mask, and the definition of visibility that the package is held to."""

from collections.abc import Callable

import torch
from torch import Tensor


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _lengths(batch: int, q_heads: int, q_len: int, k_len: int) -> dict:
    return {"key_lengths": torch.tensor([(k_len * (b + 1)) // (batch + 1) for b in range(batch)])}


def _ranges(batch: int, q_heads: int, q_len: int, k_len: int) -> dict:
    """Ranges in no order along the rows, some of them empty."""
    bounds = torch.randint(0, k_len + 1, (batch, q_len, 2), generator=_random(1), dtype=torch.int32)
    bounds[:, ::2] = bounds[:, ::2].sort(-1).values
    bounds[..., 0] = bounds.amin(-1)
    return {"key_ranges": bounds}


def _mask(heads: bool, rows: bool = True) -> Callable[[int, int, int, int], dict]:
    def case(batch: int, q_heads: int, q_len: int, k_len: int) -> dict:
        shape = (batch, q_heads if heads else 1, q_len if rows else 1, k_len)
        mask = torch.rand(shape, generator=_random(2)) > 0.5
        if rows:
            mask[:, :, :1] = False
            mask[:, :, -1:] = True
        return {"mask": mask}

    return case


MASKS: dict[str, Callable[[int, int, int, int], dict]] = {
    "full": lambda *_: {},
    "causal": lambda *_: {"causal": True},
    "window": lambda *_: {"window": (2, 1)},
    "causal window": lambda *_: {"causal": True, "window": (3, None)},
    "lengths": _lengths,
    "causal lengths": lambda *sizes: {"causal": True, **_lengths(*sizes)},
    "ranges": _ranges,
    "causal ranges": lambda *sizes: {"causal": True, **_ranges(*sizes)},
    "mask": _mask(heads=False),
    "mask of heads": _mask(heads=True),
    "mask of keys": _mask(heads=True, rows=False),
    "everything": lambda *sizes: {
        "causal": True,
        "window": (6, 0),
        **_lengths(*sizes),
        **_ranges(*sizes),
        **_mask(heads=True)(*sizes),
    },
}


def visible_pairs(
    sizes: tuple[int, int, int, int],
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None,
    key_ranges: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The visible pairs by their definition, bool [B, Hq, Sq, Sk]; sizes = (B, Hq, Sq, Sk)."""
    q_len, k_len = sizes[2:]
    position = torch.arange(q_len)[:, None] + k_len - q_len
    key = torch.arange(k_len)
    visible = torch.ones(sizes, dtype=torch.bool)
    if causal:
        visible &= key <= position
    left, right = window or (None, None)
    if left is not None:
        visible &= key >= position - left
    if right is not None:
        visible &= key <= position + right
    if key_lengths is not None:
        visible &= key < key_lengths[:, None, None, None]
    if key_ranges is not None:
        bounds = key_ranges.reshape(key_ranges.shape[0], 1, q_len, 1, 2)
        visible &= (key >= bounds[..., 0]) & (key < bounds[..., 1])
    if mask is not None:
        visible &= mask
    return visible


def largest_keys(x: Tensor, pairs: Tensor) -> Tensor:
    """The lowest key with the largest x [B, H, Sk], at least 0 or NaN, of each row of pairs [B, 1, Sq, Sk]."""
    visible = torch.where(pairs, x[:, :, None].nan_to_num(3e38, posinf=2e38), -1)
    is_largest = visible == visible.amax(-1, keepdim=True)
    return torch.where(is_largest, torch.arange(x.shape[-1]), x.shape[-1]).amin(-1)


def assert_rows_of_key_blocks(bounds: Tensor, pairs: Tensor, block: int) -> None:
    """Check that bounds [B, blocks, 2] are the first and last rows of pairs [B, Sq, Sk] that attend to each block."""
    for of_blocks, visible in zip(bounds.tolist(), pairs, strict=True):
        for (first, end), keys in zip(of_blocks, visible.split(block, -1), strict=True):
            rows = keys.any(-1).nonzero().flatten().tolist()
            assert (first, end) == (rows[0], rows[-1] + 1) if rows else first >= end
