"""The keyword arguments of the public functions as types: those of their overloads, which differ in return_aux."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Required, TypedDict

from ..core.terms import GivenPairs, GivenTerms
from ..scaling import Scaling
from ..scaling.names import ModeName
from .checks import Backend
from .key_statistics import KeyStatistics
from .paged_statistics import PagedKeyStatistics


class Common(GivenTerms, total=False):
    """Options of every function."""

    window: tuple[int | None, int | None] | None
    backend: Backend
    batch_invariant: bool | None


class Batched(GivenPairs, Common, total=False):
    """Options of `attention` and `scaled_attention`."""

    causal: bool
    key_lengths: Tensor | None
    key_ranges: Tensor | None
    mask: Tensor | None
    dropout_p: float


class ScaledOptions(Batched, total=False):
    """Options of `scaled_attention`."""

    scale: float | None
    relative_scale: Tensor | None


class Factors(TypedDict, total=False):
    """Options of every function but `scaled_attention`."""

    scaling: ModeName | str | Scaling | float | Tensor
    gain: float | Tensor | None


class Options(Factors, Batched, total=False):
    """Options of `attention`."""


class Descales(TypedDict, total=False):
    """Options of an 8-bit cache."""

    k_descale: float | Tensor | None
    v_descale: float | Tensor | None


class VarlenOptions(Factors, Common, Descales, total=False):
    """Options of `attention_varlen`."""

    block_table: Tensor | None
    statistics: PagedKeyStatistics | None
    causal: bool
    dropout_p: float


class DecodeOptions(Factors, Common, Descales, total=False):
    """Options of `attention_decode`."""

    key_lengths: Required[Tensor]
    statistics: KeyStatistics | PagedKeyStatistics | None
    block_table: Tensor | None
    query_lengths: Tensor | None
