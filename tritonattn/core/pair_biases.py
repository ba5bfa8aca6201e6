"""Terms of pairs of a row and a key: from a table by their distance, and from masks as other libraries have them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .autograd import needs_graph, values_are_read
from .visibility import Visibility

# An additive mask hides a key by a number at most this, whose exp is 0 in every dtype.
_HIDDEN = -1e4


def mask_arguments(name: str, mask: Tensor | None) -> dict[str, Tensor]:
    """The arguments mask and bias of `tritonattn.attention` for a mask, additive or bool with True for visible.

    An additive mask that takes no gradient is read on the host: one that only hides keys is no bias. While compiling,
    and under torch.func, every additive mask is one. Raises TypeError for integers.
    """
    if mask is None:
        return {}
    if mask.dtype == torch.bool:
        return {"mask": mask}
    if not mask.is_floating_point():
        raise TypeError(f"{name}: expected a bool or floating mask, got {mask.dtype}")
    hidden = mask <= _HIDDEN
    if not mask.requires_grad and values_are_read(mask, waits=True) and bool((hidden | (mask == 0)).all()):
        return {"mask": ~hidden}
    return {"mask": ~hidden, "bias": mask}


def relative_pairs(table: Tensor, right: int, visibility: Visibility, fill: float = 0.0) -> Tensor:
    """A table by distance of `Terms` as numbers of all pairs, in its dtype: [B or 1, Hq or 1, Sq, Sk].

    fill   of a pair outside of it: 0 of a bias, 1 of a factor
    """
    return reflected(table, visibility.positions() + right, slice(0, visibility.k_len), fill=fill)


class Table(NamedTuple):
    """Numbers by distance, [B or 1, Hq or 1, Sq or 1, extent].

    right   of them, the first, belong to keys after the row's position
    fill    stands for distances outside of the extent
    """

    numbers: Tensor
    right: int
    fill: float = 0.0


def of_one_extent(*tables: Table) -> tuple[Table, ...]:
    """The tables with their fill in front and behind, so that all have one extent and one `right`."""
    right = max(one.right for one in tables)
    extent = right + max(one.numbers.shape[3] - one.right for one in tables)

    def whole(one: Table) -> Table:
        before, behind = right - one.right, extent - one.numbers.shape[3] - (right - one.right)
        numbers = pad(one.numbers, (before, behind), value=one.fill) if before or behind else one.numbers
        return Table(numbers, right, one.fill)

    return tuple(map(whole, tables))


def reflected(x: Tensor, offset: Tensor, columns: slice, start: int = 0, fill: float = 0.0) -> Tensor:
    """y[b, h, i, c] = x[b, h, i, offset[b, i] - c - start] for the columns c, and `fill` outside of x.

    Entries of a table by key, and by the same formula pairs by entry.

    x        [B or 1, H or 1, S or 1, n]
    offset   int64 [B or 1, S]
    start    the number of x's first column
    """
    is_shared = x.shape[2] == 1 and offset.shape[0] == 1
    if is_shared and values_are_read(x, offset) and not needs_graph(x):
        return _by_windows(x[:, :, 0], offset[0] - start, columns, fill)
    count = x.shape[3]
    at = offset[:, None, :, None] - (torch.arange(columns.start, columns.stop, device=x.device) + start)
    inside = (at >= 0) & (at < count)
    shape = torch.broadcast_shapes(x.shape[:3], at.shape[:3])
    found = x.expand(*shape, -1).gather(-1, at.clamp(0, count - 1).expand(*shape, -1))
    return found.masked_fill(~inside, fill)


def _by_windows(x: Tensor, offset: Tensor, columns: slice, fill: float) -> Tensor:
    """`reflected` of one table [B or 1, H or 1, n] for all rows: copies of windows of it, turned round. Reads offset.

    Row i is the window of the columns' width that begins at n - 1 - offset[i] + columns.start.
    """
    count, width = x.shape[-1], columns.stop - columns.start
    first = count - 1 + columns.start - offset  # [S]
    least, most = map(int, first.aminmax())
    before, after = max(0, -least), max(0, most + width - count)
    windows = pad(x.flip(-1), (before, after), value=fill).unfold(-1, width, 1)
    return windows.index_select(-2, first + before)


def sums_of_diagonals(pairs: Tensor) -> Tensor:
    """y[..., t] = the sum of pairs[..., i, c] over i - c = t - (C - 1): [..., R + C - 1] for pairs [..., R, C].

    In rows of R + C - 1 entries, of which the last C are pairs, a diagonal is a column of rows one entry longer.
    """
    *outer, rows, keys = pairs.shape
    width = rows + keys - 1
    padded = pairs.new_zeros(*outer, rows * width + rows)
    padded[..., : rows * width].unflatten(-1, (rows, width))[..., rows - 1 :] = pairs
    return padded.as_strided((*outer, rows, width), (*padded.stride()[:-1], width + 1, 1)).sum(-2).flip(-1)
