"""The keyword arguments of the public functions as types: those of their overloads, which differ in return_aux."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Required, TypedDict

from ..scaling import Scaling
from ..scaling.names import ModeName
from .checks import Backend
from .key_statistics import KeyStatistics
from .paged_statistics import PagedKeyStatistics


class Terms(TypedDict, total=False):
    """Options of every function."""

    window: tuple[int | None, int | None] | None
    key_bias: Tensor | None
    relative_bias: Tensor | None
    relative_right: int
    bias_after_softcap: bool
    softcap: float | None
    sinks: Tensor | None
    backend: Backend
    batch_invariant: bool | None


class BatchedTerms(Terms, total=False):
    """Options of `attention` and `scaled_attention`."""

    causal: bool
    key_lengths: Tensor | None
    key_ranges: Tensor | None
    mask: Tensor | None
    bias: Tensor | None
    dropout_p: float


class ScaledOptions(BatchedTerms, total=False):
    """Options of `scaled_attention`."""

    scale: float | None


class Factors(TypedDict, total=False):
    """Options of every function but `scaled_attention`."""

    scaling: ModeName | str | Scaling | float | Tensor
    gain: float | Tensor | None


class Options(Factors, BatchedTerms, total=False):
    """Options of `attention`."""


class VarlenOptions(Factors, Terms, total=False):
    """Options of `attention_varlen`."""

    block_table: Tensor | None
    statistics: PagedKeyStatistics | None
    causal: bool
    dropout_p: float


class DecodeOptions(Factors, Terms, total=False):
    """Options of `attention_decode`."""

    key_lengths: Required[Tensor]
    statistics: KeyStatistics | PagedKeyStatistics | None
    block_table: Tensor | None
    query_lengths: Tensor | None
