"""The terms of a logit and of the softmax: one table, from which records, schemas, flags and refusals follow."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from torch import Tensor
from typing_extensions import TypedDict

from .ranges import rolled
from .visibility import Visibility


class Terms(NamedTuple):
    """The terms of a logit, and the softmax's others.

        logit[i, j] = scale * (q[i] . k[j]) * query_scale[i] * key_scale[j] * of_distance[i, j]
                      + key_bias[j] + bias[i, j] + relative[i, j]

    query_scale   [B, Hq, Sq] or None, fp32 (fp64 for fp64 q); any strides, 0 included
    key_scale     [B, Hkv, Sk] or None, likewise
    key_bias      [B, Hkv, Hq / Hkv, Sk] or None, likewise; a key with -inf has no weight, whatever the softcap
    sinks         [B, Hq, Sq] or None, likewise: a logit of each row in the softmax's denominator only, neither scaled
                  nor capped
    bias          each axis of [B, Hq, Sq, Sk] or 1, or None; of any dtype but that fp64 is for fp64 q; any strides
    relative_bias [B or 1, Hq or 1, Sq or 1, extent] or None, likewise: relative[i, j] is the entry of row i at
                  position[i] - j + relative_right, and 0 outside of the extent; `Visibility.positions`
    relative_scale    likewise, of the extent of relative_bias: of_distance[i, j], which is 1 outside of it
    softcap       c: logit -> c * tanh(logit / c), or None
    relative_right    entries that belong to keys after the row's position
    bias_after_softcap    the three biases are added to the capped logit
    query_scale_after_softcap   query_scale, above 0, multiplies the cap too, c[i] = softcap * query_scale[i]: without
                  biases it multiplies the capped logit. It has no gradient

    In a user's call the scaling gives the four scales, and may add to the biases. `TERMS` has a row for each field.
    """

    scale: float = 1.0
    query_scale: Tensor | None = None
    key_scale: Tensor | None = None
    key_bias: Tensor | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    relative_bias: Tensor | None = None
    relative_scale: Tensor | None = None
    softcap: float | None = None
    relative_right: int = 0
    bias_after_softcap: bool = False
    query_scale_after_softcap: bool = False

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The terms that may have a gradient, in the order of `Gradients`."""
        _, *found = self  # torch 2.8 traces no slice of a NamedTuple
        return tuple(found[: TENSORS.stop - 1])  # pyright: ignore[reportReturnType]

    def softcap_of_rows(self) -> float | Tensor | None:
        """The cap of each row: a number, or [B, Hq, Sq]."""
        if self.softcap is None or self.query_scale is None or not self.query_scale_after_softcap:
            return self.softcap
        return self.softcap * self.query_scale

    def by_name(self) -> dict[str, Tensor | None]:
        """The `tensors` by name."""
        _, *found = self
        found = found[: TENSORS.stop - 1]  # torch 2.8 traces no zip of other lengths
        return dict(zip(Terms._fields[TENSORS], found, strict=True))  # pyright: ignore[reportReturnType]

    def without_tensors(self) -> Terms:
        """The numbers and flags."""
        return self._replace(**dict.fromkeys(Terms._fields[TENSORS]))

    def changed(self, **terms: Any) -> Terms:
        """Replace fields as `_replace` does, which torch.compile traces only from torch 2.9 on."""
        unchanged: dict[str, Any] = dict(zip(Terms._fields, self, strict=True))
        return Terms(**(unchanged | terms))

    def settled(self) -> Terms:
        """The terms without settings of terms that are not there."""
        idle = {}
        for number, default, groups in _SETTINGS:
            if self[number] is not default and not _are_there(groups, self):
                idle[Terms._fields[number]] = default
        return self.changed(**idle) if idle else self


class GivenTerms(TypedDict, total=False):
    """The terms that users give to every function, as types."""

    key_bias: Tensor | None
    relative_bias: Tensor | None
    relative_right: int
    bias_after_softcap: bool
    softcap: float | None
    sinks: Tensor | None


class GivenPairs(GivenTerms, total=False):
    """`GivenTerms` of functions of batches, in which each pair has a place."""

    bias: Tensor | None


class Term(NamedTuple):
    """A row of `TERMS`.

    form      "vector": a tensor of full size, fp32 (fp64 for fp64 q), whose strides may be 0; "pairs": one of any
              dtype, whose axes may have one entry for all; "number" or "flag": a Python number or bool
    axes      of a tensor as backends take it; a user's has no axis G, the query heads of a key head
    enters    "factor" of q . k; "addend" to it; "cap" of the logit; "sink", in the softmax's denominator; "setting" of
              the terms that it stands `beside`
    gradient  the tensor may have one: a field of `Needs` and `Gradients`
    flag      kernels have other code with it: a field of `tuning.Problem`
    typical   the axes along which a tensor of a typical call varies, or a number's value
    beside    of each group one term must be there, or the setting says nothing
    """

    name: str
    form: Literal["vector", "pairs", "number", "flag"]
    axes: tuple[str, ...] = ()
    enters: Literal["factor", "addend", "cap", "sink", "setting"] = "setting"
    gradient: bool = False
    flag: bool = True
    typical: Any = ()
    beside: tuple[tuple[str, ...], ...] = ()


_ROWS, _KEYS, _BIASES = ("B", "Hq", "Sq"), ("B", "Hkv", "Sk"), ("key_bias", "bias", "relative_bias")

TERMS = (
    Term("scale", "number", enters="factor", flag=False),
    Term("query_scale", "vector", _ROWS, "factor", gradient=True, typical=_ROWS),
    Term("key_scale", "vector", _KEYS, "factor", gradient=True, typical=_KEYS),
    Term("key_bias", "vector", (*_KEYS[:2], "G", "Sk"), "addend", gradient=True, typical=(*_KEYS[:2], "G", "Sk")),
    Term("sinks", "vector", _ROWS, "sink", gradient=True, typical=("Hq",)),
    Term("bias", "pairs", (*_ROWS, "Sk"), "addend", gradient=True, typical=(*_ROWS, "Sk")),
    Term("relative_bias", "pairs", (*_ROWS, "extent"), "addend", gradient=True, typical=("Hq", "Sq", "extent")),
    Term("relative_scale", "pairs", (*_ROWS, "extent"), "factor", gradient=True, typical=("extent",)),
    Term("softcap", "number", enters="cap", typical=20.0),
    Term("relative_right", "number", flag=False, beside=(("relative_bias", "relative_scale"),)),
    Term("bias_after_softcap", "flag", beside=(("softcap",), _BIASES)),
    Term("query_scale_after_softcap", "flag", beside=(("softcap",), ("query_scale",))),
)

assert tuple(term.name for term in TERMS) == Terms._fields
TENSORS = slice(1, 1 + sum(term.gradient for term in TERMS))  # of the fields, in the order of `Gradients`
DEFAULTS = tuple(Terms._field_defaults.values())
OF_SCALING = ("scale", "query_scale", "key_scale", "query_scale_after_softcap")  # the first: users give the others, too
_SETTINGS = [(i, DEFAULTS[i], term.beside) for i, term in enumerate(TERMS) if term.beside]
ADDENDS = tuple(term.name for term in TERMS if term.enters == "addend")
SINKS = tuple(term.name for term in TERMS if term.enters == "sink")
PAIRS = tuple(term.name for term in TERMS if term.form == "pairs")
TABLES = tuple(term.name for term in TERMS if "extent" in term.axes)  # by distance, of `PAIRS`
# The axes of the tensors that may have a gradient: operands, then terms.
AXES = {
    "q": (*_ROWS, "D"),
    "k": (*_KEYS, "D"),
    "v": (*_KEYS, "Dv"),
    **{term.name: term.axes for term in TERMS[TENSORS]},
}


def _are_there(groups: tuple[tuple[str, ...], ...], terms: Terms) -> bool:
    return all(any(getattr(terms, name) is not None for name in group) for group in groups)


def given(terms: Terms) -> Iterator[str]:
    """The names of the terms that a call has: what a backend must honour, or refuse by name. It has a scale always."""
    for term, value, default in zip(TERMS, terms, DEFAULTS, strict=True):
        if value is not default and term.name != "scale" and _are_there(term.beside, terms):
            yield term.name


def others_than(*names: str) -> list[tuple[int, Any]]:
    """The fields of `Terms`, and their defaults, but the scale and these: what a backend without them must not meet."""
    return [(i, DEFAULTS[i]) for i, term in enumerate(TERMS) if term.name not in ("scale", *names)]


def has_any(terms: Terms, others: list[tuple[int, Any]]) -> bool:
    """True where terms have one of those that `others_than` gave."""
    for number, default in others:  # no generator: each masked call on a CPU asks
        if terms[number] is not default:
            return True
    return False


def addends(record: Any) -> list[Tensor]:
    """The biases that `Terms`, or their `Gradients`, have."""
    return [x for name in ADDENDS if (x := getattr(record, name)) is not None]


def flags(terms: Terms) -> dict[str, bool]:
    """The fields of `tuning.Problem` that say which terms a call has."""
    there = set(given(terms))
    return {term.name: term.name in there for term in TERMS if term.flag}


class Needs(namedtuple("Needs", AXES, defaults=[False] * len(AXES))):
    """The tensors of a call whose gradients are asked for: a bool each, by their names in `AXES`."""

    __slots__ = ()


class Gradients(namedtuple("Gradients", AXES, defaults=[None] * len(AXES))):
    """Gradients of a call's tensors, by their names in `AXES`; None for those not asked for."""

    __slots__ = ()

    def rolled(self, first: Tensor) -> Gradients:
        """The gradients by keys counted from first[b] of each entry, int64 [B]; the keys before it come last."""
        return self._replace(**rolled_keys(first, **self._asdict()))


def rolled_keys(first: Tensor, **tensors: Tensor | None) -> dict[str, Any]:
    """The tensors along the keys, of those named as in `AXES`, with keys counted from first[b] of each entry."""
    of_keys = {name: x for name, x in tensors.items() if x is not None and "Sk" in AXES[name]}
    return {name: rolled(x, first, AXES[name].index("Sk")) for name, x in of_keys.items()}


def sinks_of_heads(sinks: Tensor) -> Tensor | None:
    """The sinks [Hq] of a call whose rows share one per head, as their strides say; None where rows have their own."""
    shares = all(sinks.shape[axis] == 1 or sinks.stride(axis) == 0 for axis in (0, 2))
    return sinks[0, :, 0] if shares else None


def per_group(bias: Tensor, visibility: Visibility) -> Tensor:
    """A bias as [B, Hkv, Hq / Hkv, Sk], from one with a row per query head or a row per key head."""
    batch, kv_heads, k_len = visibility.keys
    group = visibility.q_heads // max(kv_heads, 1)
    if bias.dim() > 1:
        by_key_head = bias.shape[-2] in (1, kv_heads)
        bias = bias.unsqueeze(-2) if by_key_head else bias.unflatten(-2, (kv_heads, group))
    return bias.expand(batch, kv_heads, group, k_len)
