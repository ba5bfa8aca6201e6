"""Errors of the emulator."""

from __future__ import annotations


class PTXError(Exception):
    """Anything the emulator refuses: an unsupported instruction, a deadlock, a bad launch."""


class PTXFault(PTXError):
    """A fault of the emulated program.

    category: "out-of-bounds", "misaligned", "mbarrier", "tensor map" or "divergent collective"; line and text of the
    PTX instruction, loc (file, line, column) of the source; cta, thread, address; nearest: which tensor, how far.
    """

    def __init__(self, category: str, message: str, **fields) -> None:
        super().__init__(message)
        self.category = category
        self.__dict__.update(fields)
