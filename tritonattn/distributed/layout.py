"""The part of a sequence that each rank of a mesh holds: equal chunks, numbered along the sequence.

    contiguous   rank r holds chunk r of P
    zigzag       rank r holds the chunks r and 2P - 1 - r of 2P: under causal attention all ranks have the same work

Source of the zig-zag: Brandon et al. 2023 (striped attention), arXiv:2311.09431, and Llama 3, arXiv:2407.21783, 3.3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..core.hints import type_of
from ..core.torch_distributed import is_dtensor

LAYOUTS = ("contiguous", "zigzag")


@dataclass(frozen=True, eq=False)
class Split:
    """This process among those that share a sequence, and how they share it."""

    group: dist.ProcessGroup
    rank: int
    size: int
    layout: str

    @classmethod
    def of(cls, mesh: Any, layout: str) -> Split:
        """Check a mesh of one dimension and the name of a layout."""
        if not isinstance(mesh, DeviceMesh):
            hint = (
                "; DeviceMesh.from_group(group, device_type) makes one" if isinstance(mesh, dist.ProcessGroup) else ""
            )
            raise TypeError(f"mesh: expected a torch.distributed DeviceMesh, got {type_of(mesh)}{hint}")
        if mesh.ndim != 1:
            raise ValueError(f"mesh: expected one dimension, as of mesh['cp'], got {mesh.ndim} of sizes {mesh.shape}")
        if layout not in LAYOUTS:
            raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
        group = mesh.get_group()
        return cls(group, group.rank(), group.size(), layout)

    @property
    def chunks_per_rank(self) -> int:
        return 1 if self.layout == "contiguous" else 2

    @property
    def chunk_count(self) -> int:
        return self.size * self.chunks_per_rank

    def chunks(self, rank: int | None = None) -> list[int]:
        """The chunks of a rank, of this one without an argument, in the order in which it holds them."""
        rank = self.rank if rank is None else rank
        return [rank] if self.layout == "contiguous" else [rank, 2 * self.size - 1 - rank]

    def check(self, name: str, tokens: int) -> None:
        """Raise ValueError unless a rank can hold this number of tokens in whole chunks."""
        if tokens % self.chunks_per_rank:
            raise ValueError(
                f"{name}: expected an even number of tokens of this rank for layout 'zigzag', got {tokens}"
            )

    def positions(self, length: int, device: torch.device) -> Tensor:
        """The positions in the sequence of the `length` tokens that this rank holds: int64 [length]."""
        n = length // self.chunks_per_rank
        return torch.cat([torch.arange(c * n, (c + 1) * n, device=device) for c in self.chunks()])

    def in_order(self, x: Tensor, dim: int) -> Tensor:
        """x, whose chunks stand rank by rank along an axis, with the chunks in the order of the sequence."""
        order = self._order()
        return self._permuted(x, dim, [order.index(chunk) for chunk in range(self.chunk_count)])

    def by_rank(self, x: Tensor, dim: int) -> Tensor:
        """x, whose chunks stand in the order of the sequence along an axis, with the chunks rank by rank."""
        return self._permuted(x, dim, self._order())

    def _order(self) -> list[int]:
        return [chunk for rank in range(self.size) for chunk in self.chunks(rank)]

    def _permuted(self, x: Tensor, dim: int, order: list[int]) -> Tensor:
        if self.layout == "contiguous":
            return x
        parts = x.chunk(self.chunk_count, dim)
        return torch.cat([parts[chunk] for chunk in order], dim)


def refuse_dtensors(**tensors: Any) -> None:
    """Raise TypeError for a DTensor: a rank's part of a sequence is a plain tensor."""
    for name, x in tensors.items():
        if is_dtensor(x):
            placed = ", ".join(map(str, x.placements))
            raise TypeError(
                f"{name}: expected a plain tensor, got a DTensor placed ({placed}) on a mesh of"
                f" {tuple(x.device_mesh.shape)}; {name}.to_local() is this rank's part, {name}.full_tensor() the whole"
            )
