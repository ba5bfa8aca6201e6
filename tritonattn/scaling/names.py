"""The modes by name, the one reader of names, and the error for other names."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

import torch

from ..core.hints import type_of
from . import constants, cosine, counts, distances, key_norms, positional
from .base import NO_BASE, Scaling

ModeName = Literal[
    # generated: names
    "sqrt_dim",
    "dim",
    "none",
    "key_count",
    "sqrt_key_count",
    "log_key_count",
    "log_power",
    "key_norm_sum",
    "key_norm_mean",
    "key_norm_rms",
    "key_norm_max",
    "key_norm_l2",
    "qwen_logn",
    "grok2",
    "llama4",
    "ministral3",
    "inkling",
    "inkling2",
    "beam",
    "cosine",
    "scale_invariant",
    # end
]
LearnedName = Literal[
    # generated: learned_names
    "per_head",
    "ssmax",
    "learned_cosine",
    "power_law",
    "learned_log_power",
    # end
]
LayerMode = ModeName | LearnedName | str

# Modes that are modules, and the expression that makes one for q of Hq heads.
_LEARNED = {
    # generated: learned
    "learned_cosine": "LearnedCosine(heads=Hq)",
    "learned_log_power": "LearnedLogPower(heads=Hq, base=LENGTH)",
    "per_head": "PerHead(heads=Hq)",
    "power_law": "PowerLaw(heads=Hq)",
    "query_adaptive_ssmax": "QueryAdaptiveSSMax(heads=Hq, head_dim=D)",
    "ssmax": "SSMax(heads=Hq, base=LENGTH)",
    "scheduled": "Scheduled(mode_a='sqrt_dim', mode_b='key_norm_mean', steps=1000)",
    # end
}
_OTHER_WORDS = {"logn": "log_key_count", "scalablesoftmax": "ssmax"}  # by `_letters`


if TYPE_CHECKING:
    from typing_extensions import TypedDict

    class Modes(TypedDict, extra_items=type[Scaling]):
        """Classes by name, with the arguments of each; a user's `Scaling` may be put there too."""

        # generated: types
        sqrt_dim: type[constants.SqrtDim]
        dim: type[constants.Dim]
        none: type[constants.Unscaled]
        key_count: type[counts.KeyCount]
        sqrt_key_count: type[counts.SqrtKeyCount]
        log_key_count: type[counts.LogKeyCount]
        log_power: type[counts.LogPower]
        key_norm_sum: type[key_norms.KeyNormSum]
        key_norm_mean: type[key_norms.KeyNormMean]
        key_norm_rms: type[key_norms.KeyNormRms]
        key_norm_max: type[key_norms.KeyNormMax]
        key_norm_l2: type[key_norms.KeyNormL2]
        qwen_logn: type[positional.QwenLogn]
        grok2: type[positional.Grok2]
        llama4: type[positional.Llama4]
        ministral3: type[positional.Ministral3]
        inkling: type[positional.Inkling]
        inkling2: type[positional.Inkling2]
        beam: type[positional.Beam]
        cosine: type[cosine.Cosine]
        scale_invariant: type[distances.ScaleInvariant]
        # end


class _Modes(dict[str, type[Scaling]]):
    """Classes of modes by name. Another name raises KeyError with the nearest one."""

    def __missing__(self, name: str) -> NoReturn:
        raise KeyError(_unknown(name, name))


def _named(*modules: ModuleType) -> Iterator[type[Scaling]]:
    """The classes of modes in some files, in the order in which they stand there."""
    for module in modules:
        yield from (one for one in vars(module).values() if isinstance(one, type) and "about" in vars(one))


_CLASSES = _named(constants, counts, key_norms, positional, cosine, distances)
SCALINGS: Modes = cast("Modes", _Modes({mode.name: mode for mode in _CLASSES}))


_made: dict[str, Scaling] = {}
_MOST_MADE = 64


def named_scaling(text: str) -> Scaling:
    """The mode of a text, such as "dim", as `parsed` reads it; one of this package is made once, having no state."""
    if torch.compiler.is_compiling():
        return SCALINGS[text]() if text in SCALINGS else _named_scaling(text)
    found = _made.get(text)
    if found is None or SCALINGS.get(found.name) is not type(found):
        found = _named_scaling(text)
        if "about" in vars(type(found)) and getattr(found, "base", None) is not NO_BASE:  # one warns when it is made
            if len(_made) >= _MOST_MADE:
                _made.clear()
            _made[text] = found
    return found


def _named_scaling(text: str) -> Scaling:
    mode, arguments = parsed(text)
    return mode(**arguments)


def parsed(text: str, learned: Mapping[str, type[Scaling]] = MappingProxyType({})) -> tuple[Any, dict[str, float]]:
    """The class, in SCALINGS or `learned`, and the arguments of NAME, NAME:LENGTH or NAME(NUMBER, ...).

    "log_key_count:64" is LogKeyCount(base=64), and so is "log_key_count(64)", which `Advice.mode` writes: LENGTH is the
    mode's `trained_length`, and the numbers are arguments of modes that do not learn, in order. Raises ValueError.
    """
    name, colon, length = text.partition(":")
    numbers = length if colon else ""
    if not colon and text.endswith(")"):
        name, _, numbers = text[:-1].partition("(")
    mode = SCALINGS[name] if name in SCALINGS else learned.get(name)
    if mode is None:
        raise ValueError(_unknown(name, text, learned))
    if name == text:
        return mode, {}
    names = (mode.trained_length,) * (mode.trained_length != "") if colon else getattr(mode, "__match_args__", ())
    values = [_number(one.strip()) for one in numbers.split(",")]
    if None in values or len(values) > len(names):
        known = {**SCALINGS, **learned}
        lengths = ", ".join(f"{one}:LENGTH" for one in known if known[one].trained_length)
        raise ValueError(f"scaling: expected a name, or one of {lengths}, LENGTH a number of tokens, got {text!r}")
    return mode, dict(zip(names, values, strict=False))  # pyright: ignore[reportReturnType]


def refuse_scaling(scaling: Any, wanted: str = "a name, a Scaling, a float or a tensor") -> NoReturn:
    """Raise the TypeError for a value that is not a scaling."""
    if isinstance(scaling, type) and issubclass(scaling, Scaling):
        parameters = inspect.signature(scaling).parameters.values()
        required = [f"{p.name}=..." for p in parameters if is_required(p)]
        name = scaling.__name__
        write = f"write {name}({', '.join(required)})"
        raise TypeError(f"scaling: expected an instance of a Scaling, got the class {name}; {write}")
    raise TypeError(f"scaling: expected {wanted}, got {type_of(scaling)}")


def is_required(parameter: inspect.Parameter) -> bool:
    """True for a parameter of a class that has to be given."""
    return parameter.default is parameter.empty and parameter.kind not in (
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
    )


def hint_for_argument(scaling: Any, word: str, value: Any) -> str | None:
    """How to write a mode by name with an argument that a call was given beside it; None for other words."""
    if not isinstance(scaling, str):
        return None
    if scaling not in SCALINGS:
        return f'expected scaling="{scaling}:{value}", got {word}=' if scaling in _LEARNED and word == "base" else None
    mode = SCALINGS[scaling]
    if word not in getattr(mode, "__match_args__", ()):
        return None
    short = f' or "{scaling}:{value}"' if word == mode.trained_length and isinstance(value, int) else ""
    return f'expected scaling=tritonattn.SCALINGS["{scaling}"]({word}={value!r}){short}, got {word}='


def _number(text: str) -> float | None:
    """A number without a sign, or None."""
    if text.isdecimal():
        return int(text)
    whole, _, rest = text.partition(".")
    return float(text) if (whole + rest).isdecimal() else None


def _letters(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())


def _unknown(name: Any, text: Any, learned: Iterable[str] = ()) -> str:
    """The message for a name that selects no mode, in a text."""
    if name in _LEARNED:
        return (
            f"scaling: expected a mode without a state, got {text!r}, which is a module: make it once, keep"
            f" it with the model, and pass it, scaling=tritonattn.nn.{_LEARNED[name]}"
        )
    known, letters = [*SCALINGS, *learned], _letters(str(name))
    near = {_letters(one): one for one in (*known, *_LEARNED)} | _OTHER_WORDS
    close = difflib.get_close_matches(letters, near, n=1)
    hint = f" (did you mean {near[close[0]]!r}?)" if close else ""
    return f"scaling: expected one of {', '.join(known)}, got {text!r}{hint}"
