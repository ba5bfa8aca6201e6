"""The scalings of --modes, which a model is patched with, or trained with in the studies of perf."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..core.errors import CommandError
from ..core.hints import nearest
from ..nn import LEARNED, QueryAdaptiveSSMax
from ..nn.registry import scaling_of_layer
from ..scaling import SCALINGS, Scaling

BASELINE = "sqrt_dim"
_WRITTEN = re.compile(r"(?P<mode>\w+)(:(?P<base>\d+|CONTEXT))?(\*(?P<gain>[\d.]+))?")
_ADVISED = re.compile(r"(log_key_count|qwen_logn)\((\w+)\)")  # NAME(BASE), as `Advice.mode` writes it
_LEARNED = (*LEARNED, QueryAdaptiveSSMax.name)
# Modes with a base: a row of that many keys starts as sqrt_dim's.
_BASED = tuple(name for name, mode in {**SCALINGS, **LEARNED}.items() if mode.trained_length)


def build(mode: str, heads: int, head_dim: int, keys: int) -> str | Scaling:
    """Make the scaling of an attention layer as training begins with it.

    mode   a name that `check_mode` knows
    keys   the most keys that a row of the layer attends to in training; the base of modes that have one
    """
    if mode == QueryAdaptiveSSMax.name:
        return QueryAdaptiveSSMax(heads, head_dim)
    if mode in _BASED or mode in LEARNED:
        return scaling_of_layer(f"{mode}:{keys}" if mode in _BASED else mode, heads)
    return mode


def check_mode(name: str, also: str = "") -> None:
    """Raise CommandError for a name that neither `SCALINGS` has nor learned modes; `also` says what else there is."""
    if name not in SCALINGS and name not in _LEARNED:
        known = f"{', '.join(SCALINGS)}{also}, or one of {', '.join(_LEARNED)}"
        raise CommandError(f"--modes: expected one of {known}, got {name!r}{nearest(name, [*SCALINGS, *_LEARNED])}")


@dataclass(frozen=True)
class PatchMode:
    """A mode as training with rows of up to `keys` keys would begin with it, a constant gain, and their name."""

    name: str
    mode: str
    keys: int
    gain: float | None = None

    def scaling(self, heads: int, head_dim: int) -> str | Scaling:
        """Make the scaling of a layer; a mode that learns is new, and where training begins."""
        return build(self.mode, heads, head_dim, self.keys)


def patch_modes(texts: Iterable[str], context: int | None) -> list[PatchMode]:
    """Parse modes: the baseline first, then each once, though a BASE of CONTEXT may be the number of another."""
    found = (patch_mode(text, context) for text in (BASELINE, *texts))
    return list({one.name: one for one in found}.values())


def check_written(texts: Iterable[str]) -> None:
    """Raise CommandError for a mode that no model has, before one is loaded."""
    for text in texts:
        patch_mode(text, 2048)  # of any context length


def patch_mode(text: str, context: int | None) -> PatchMode:
    """Parse NAME[:BASE][*GAIN], NAME being one that `build` knows; BASE is the model's trained length unless given.

    A mode that learns has to be given its BASE: its name alone starts at sqrt_dim, which is the model as it is.

    Raises CommandError for another text.
    """
    parts = _WRITTEN.fullmatch(_ADVISED.sub(r"\1:\2", text))
    if parts is None:
        raise CommandError(f"--modes: expected NAME[:BASE][*GAIN], BASE a number of tokens or CONTEXT, got {text!r}")
    mode, base, gain = parts.group("mode", "base", "gain")
    check_mode(mode)
    if mode in _BASED:
        if base is None and mode in LEARNED:
            raise CommandError(
                f"--modes: expected {mode}:CONTEXT or {mode}:BASE, got {text!r}, which starts at sqrt_dim"
            )
        if base in (None, "CONTEXT") and context is None:
            raise CommandError(
                f"--modes: expected a base in {text!r}, as the model's configuration has no max_position_embeddings: "
                f"{mode}:BASE"
            )
        base = context if base in (None, "CONTEXT") else base
    elif base is not None:
        raise CommandError(f"--modes: expected a base after {', '.join(_BASED)} only, got {text!r}")
    name = f"{mode}{f':{base}' if base else ''}{f'*{gain}' if gain else ''}"
    try:
        one = PatchMode(name, mode, int(base or 2), None if gain is None else float(gain))
        one.scaling(1, 1)  # refuses the base
    except ValueError as error:
        raise CommandError(f"--modes: {text!r}: {error}") from error
    return one
