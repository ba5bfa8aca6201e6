"""The interface of scalings, and its result."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..core.hints import warn_once
from ..core.statistics import Statistics
from ..core.visibility import Visibility


@dataclass(frozen=True, eq=False)
class Scales:
    """The factor of every logit as a number and vectors, the result of `Scaling.scales`.

        logit[i, j] = constant * (q[i] . k[j]) * query[i] * key[j] * relative[i, j] + key_bias[j] + relative_bias[i, j]

    query       broadcastable to [B, Hq, Sq], or one row per key head, [B, Hkv, Sq]; any float dtype; None is 1
    key         broadcastable to [B, Hkv, Sk]; any float dtype; None is 1
    is_finite   query is finite in rows without keys too; a call puts 0 there otherwise
    key_bias    broadcastable to [B, Hq, Sk] or [B, Hkv, Sk]; any float dtype; None is 0; a key with -inf has no weight;
                `nn.counted_from_rows` marks one that counts from the row's position, as `addend` then does
    relative, relative_bias   tables by distance, with relative_right as relative_bias of `attention`, of a packed batch
                [1, Hq or 1, T_q or 1, extent]; None, and a distance outside of the extent, is 1 and 0

    A call raises ValueError for another shape, and TypeError for another type.

    >>> import torch, tritonattn
    >>> q, k = torch.randn(2, 1, 4, 16, 8)
    >>> scales = tritonattn.Scales(8**-0.5, query=k.norm(dim=-1).mean(-1, keepdim=True).reciprocal())
    >>> scales.query.shape  # one number per key head
    torch.Size([1, 4, 1])
    """

    constant: float
    query: Tensor | None = None
    key: Tensor | None = None
    is_finite: bool = False
    key_bias: Tensor | None = None
    relative_bias: Tensor | None = None
    relative_right: int = 0
    relative: Tensor | None = None


class Scaling:
    """A logit scaling: logit[i, j] = (q[i] . k[j]) * factor[i, j], plus a bias of the key or distance where one has it.

    A mode states its factor twice, so that a mistake in one of them shows. `scales` gives kernels a number and vectors.
    `multiplier` is the formula as its paper writes it, for the reference alone, and uses neither `scales` nor the
    methods of `visibility` and `statistics`; a mode with a bias states that a second time in `addend`, or in
    `relative_addend`, and one with a factor of distances in `relative_multiplier`. All are differentiable with respect
    to q and k. A factor, and a bias, may depend on the keys that the row attends to, and on no others.

    name               the mode's name, in errors and in saved configs
    reads_keys         False: `scales` takes from k only its shape, and everything else from `statistics`; decoding then
                       gathers no pages for it. Not inherited: True in a subclass that does not set it.
    takes_fp64         True: `scales` gets statistics in fp64 where its factor enters another. Not inherited either.
    trained_length     the argument that "NAME:LENGTH" gives, the n at which the factor is that of sqrt_dim; "" where a
                       mode has none
    after_softcap      True: under a softcap c the logit is t c tanh(q . k / (sqrt(D) c)), t = factor sqrt(D) of a row,
                       above 0; `Scales.query` has no gradient there
    normalises_query   True: the factor divides by ||q||. Logits are then the same whatever q was multiplied by, and a
                       patched model's factor does not apply.

    >>> import tritonattn
    >>> class RootCount(tritonattn.Scaling):
    ...     name, reads_keys = "root_count", False
    ...     def scales(self, q, k, visibility, statistics):
    ...         return tritonattn.Scales(1.0, query=visibility.counts().clamp(min=1) ** -0.5)  # [B, 1, Sq]
    ...     def multiplier(self, q, k, visible):
    ...         return visible.sum(-1, keepdim=True).clamp(min=1) ** -0.5  # broadcastable to [B, Hq, Sq, Sk]
    >>> max(tritonattn.check_scaling(RootCount()).values()) < 1e-6  # the two agree, under every mask
    True
    """

    name: ClassVar[str]
    about: ClassVar[About]
    reads_keys: bool = True
    takes_fp64: bool = False
    trained_length: ClassVar[str] = ""
    after_softcap: bool = False
    normalises_query: bool = False

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "reads_keys" not in vars(cls):
            cls.reads_keys = True
        if "takes_fp64" not in vars(cls):
            cls.takes_fp64 = False

    def scales(self, q: Tensor, k: Tensor, visibility: Visibility, statistics: Statistics) -> Scales:
        """The factor of q [B, Hq, Sq, D] and k [B, Hkv, Sk, D] as a float and at most two vectors.

        visibility.counts()                           n of each row, fp64 [B or 1, 1 or Hq, Sq]
        statistics.norm_sum, .norm_square_sum         of ||k|| over the keys that each row attends to, [B, Hkv, Sq]
        statistics.norm_max                           likewise
        statistics.norms, .query_norms(q)             ||k||, [B, Hkv, Sk], and ||q||, [B, Hq, Sq]
        """
        raise NotImplementedError(f"{type(self).__name__} must define scales(q, k, visibility, statistics)")

    def multiplier(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        """The factor of every pair, broadcastable to [B, Hq, Sq, Sk].

        q [B, Hq, Sq, D]; k [B, Hq, Sk, D], repeated to the query heads; visible bool, broadcastable to [B,
        Hq, Sq, Sk]. A call hands it zeros for keys that no row attends to and of rows without keys. Values
        at invisible pairs are ignored, but a key must not affect the factors of rows that do not attend to it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define multiplier(q, k, visible)")

    def addend(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor | None:
        """The bias of every pair, of arguments and shape as of `multiplier`; None, where a mode has none, is 0."""
        return None

    def relative_multiplier(self, q: Tensor, k: Tensor, distance: Tensor) -> Tensor | None:
        """The part of the factor that depends on the distance, as of `relative_addend`; None is 1."""
        return None

    def relative_addend(self, q: Tensor, k: Tensor, distance: Tensor) -> Tensor | None:
        """The bias of every pair by its distance, of shape as of `multiplier`; None, where a mode has none, is 0.

        distance   int64 [B or 1, 1, Sq, Sk]: how many positions each key lies before the row's position
        """
        return None


@dataclass(frozen=True)
class About:
    """The text and settings of a named mode: tables of documents, the playground, types and patches ask for it.

    factor    its formula, of n, D, ‖q‖, ‖k‖, sum, mean and max ‖k‖, sum and mean ‖k‖², of numbers, of `letters`, and of
              base or L, the trained length. Tests compute it, so a product is written by a blank.
    letters   values of its letters
    addend    formula of what it adds; there and in factor t is how far the key lies from the row. "" for nothing
    source    a paper, or a model whose code has it
    advice    when to take it
    example   settings that change the factor of a few keys
    config    entries of a model's config that hold settings, a path through dicts each
    models    types of models whose code multiplies q by it
    """

    factor: str
    letters: Mapping[str, str]
    addend: str
    source: str
    advice: str
    example: Mapping[str, float]
    config: Mapping[str, str]
    models: tuple[str, ...]

    @property
    def reads_norms(self) -> bool:
        """True where the factor depends on norms of keys."""
        return "‖k‖" in self.factor

    @property
    def has_key_factor(self) -> bool:
        """True where it multiplies each key by a factor of the key's own norm."""
        return re.search(r"(?<!sum )(?<!mean )(?<!max )‖k‖", self.factor) is not None


Mode = TypeVar("Mode", bound=type[Scaling])


def mode(
    name: str,
    factor: str,
    letters: Mapping[str, str] | None = None,
    *,
    addend: str = "",
    source: str = "-",
    advice: str = "",
    example: Mapping[str, float] | None = None,
    config: Mapping[str, str] | None = None,
    models: tuple[str, ...] = (),
) -> Callable[[Mode], Mode]:
    """Class decorator of a named mode, whose `scales` reads keys by `statistics` alone. Arguments as of `About`."""

    def named(cls: Mode) -> Mode:
        cls.name, cls.reads_keys, cls.takes_fp64 = name, False, True
        cls.about = About(factor, letters or {}, addend, source, advice, example or {}, config or {}, models)
        return cls

    return named


NO_BASE = math.exp(1)  # e, and no other object is this one: the base that was not given


def warn_without_base(name: str, base: float) -> None:
    """Warn once of a mode whose base is e since none was given."""
    if base is NO_BASE and not torch.compiler.is_compiling():
        warn_once(
            f"{name}: expected a base, the n at which the logits are those of sqrt_dim, got none, which is base e:"
            f' write "{name}:64", or base=64, with the length of your training for 64'
        )


def reads_distances(scaling: Scaling, q: Tensor) -> bool:
    """True where a scaling of q [B, Hq, Sq, D] has a factor or a bias of distances."""
    row, distance = q[:, :, :1], torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=q.device)
    of_distance = scaling.relative_multiplier(row, row, distance), scaling.relative_addend(row, row, distance)
    return any(x is not None for x in of_distance)


def relative_gain(scaling: Any, factor: float | Tensor | None, head_dim: int, gain: Any = None) -> Any:
    """The gain that keeps a model's factor of q . k with a mode: factor * sqrt(D) * gain.

    gain   a float, a tensor or None, which is 1; returned where factor is None or 1 / sqrt(D), or the mode a cosine
    """
    if factor is None or getattr(scaling, "normalises_query", False):
        return gain
    relative = factor * math.sqrt(head_dim)
    if not isinstance(relative, Tensor) and math.isclose(relative, 1.0, rel_tol=1e-9):
        return gain
    return relative if gain is None else gain * relative


def dense_norms(x: Tensor, counted: Tensor) -> Tensor:
    """||x|| of [B, Hq, S, D] as [B, Hq, S], fp64; 0 where `counted` is False, whatever x holds."""
    return torch.where(counted[..., None], x.double(), 0).norm(dim=-1)


def check_positive(argument: str, value: float, above: float = 0.0) -> None:
    """Refuse a parameter of a mode that is not a finite number above `above`."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not above < value < float("inf"):
        raise ValueError(f"{argument}: expected a finite number above {above:g}, got {value!r}")
