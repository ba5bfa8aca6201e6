"""Records that the code generator makes of instructions, for the machine to execute."""

from __future__ import annotations

from dataclasses import dataclass

from .instruction import Instruction
from .types import TYPES


@dataclass(frozen=True)
class Access:
    """The memory access of a thread: `vector` elements of `size` bytes of a PTX type.

    registers   that a load fills, None for those it drops; a narrow element is extended, with its sign where signed
    operation   of an atomic: "add", "cas", ...
    """

    instruction: Instruction
    space: str
    type: str
    size: int
    vector: int = 1
    registers: tuple[int | None, ...] = ()
    operation: str | None = None

    @property
    def index(self) -> int:
        return self.instruction.index

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # read for every execution, so not properties
        set_field(self, "width", self.size * self.vector)
        set_field(self, "element", f"u{self.size}")
        set_field(self, "signed", TYPES[self.type].encoding == "signed" if self.type in TYPES else False)


@dataclass(frozen=True)
class MatrixAccess:
    """ldmatrix and stmatrix: `count` 8 x 8 matrices of 16-bit elements."""

    instruction: Instruction
    count: int
    transposed: bool
    registers: tuple[int | None, ...]


@dataclass(frozen=True)
class WarpgroupProduct:
    """wgmma: D[64, columns] = A[64, depth] @ B[depth, columns], signed.

    a_rows_along_k, b_rows_along_k: MN-major tiles; registers: D; guarded: D and those of A, while the product runs.
    """

    instruction: Instruction
    columns: int
    depth: int
    element: str
    sign: int
    a_rows_along_k: bool
    b_rows_along_k: bool
    registers: tuple[int, ...]
    guarded: frozenset[int]


@dataclass(frozen=True)
class WarpOperation:
    """shfl, vote, redux: the mode is part of the opcode."""

    instruction: Instruction
    mode: str


@dataclass(frozen=True)
class TensorCopy:
    """A bulk tensor copy; operation: of a reducing store."""

    instruction: Instruction
    operation: str | None = None
