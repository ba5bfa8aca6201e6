"""The scalings of a command's --modes: NAME[:BASE][*GAIN]."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ...core.errors import CommandError
from ...scaling import Scaling
from ..training.modes import build, check_mode

# NAME(BASE) is how `Advice.mode` writes a mode whose first argument is its base.
_WRITTEN = re.compile(r"(?P<mode>[\w+]+)(:(?P<base>\d+|CONTEXT))?(\*(?P<gain>[\d.]+))?")
_ADVISED = re.compile(r"(log_key_count|qwen_logn)\((\w+)\)")
_GAIN = "+gain"  # a learned gain, which starts where a row of `keys` keys asks for
_BASED = ("log_key_count", "log_power", "qwen_logn", "ssmax", "learned_log_power")
BASELINE = "sqrt_dim"


@dataclass(frozen=True)
class Variant:
    """A mode as training with rows of up to `keys` keys would begin with it, a constant gain, and their name."""

    name: str
    mode: str
    keys: int
    gain: float | None = None

    def scaling(self, heads: int, head_dim: int) -> str | Scaling:
        """Make the scaling of a layer; a mode that learns is new, and where training begins."""
        return build(self.mode, heads, head_dim, self.keys)


def variants(texts: Iterable[str], context: int | None) -> list[Variant]:
    """Parse modes: the baseline first, then each once, though a BASE of CONTEXT may be the number of another."""
    found = (variant(text, context) for text in (BASELINE, *texts))
    return list({one.name: one for one in found}.values())


def check_written(texts: Iterable[str]) -> None:
    """Raise CommandError for a mode that no model has, before one is loaded."""
    for text in texts:
        variant(text, 2048)  # of any context length


def variant(text: str, context: int | None) -> Variant:
    """Parse NAME[:BASE][*GAIN], NAME being one that `build` knows; BASE is the model's trained length unless given.

    Raises CommandError for another text.
    """
    parts = _WRITTEN.fullmatch(_ADVISED.sub(r"\1:\2", text))
    if parts is None:
        raise CommandError(f"--modes: expected NAME[:BASE][*GAIN], BASE a number of tokens or CONTEXT, got {text!r}")
    mode, base, gain = parts.group("mode", "base", "gain")
    check_mode(mode)
    if mode.removesuffix(_GAIN) in _BASED or mode.endswith(_GAIN):
        base = _trained(text, context) if base in (None, "CONTEXT") else base
    elif base is not None:
        raise CommandError(f"--modes: expected a base after {', '.join(_BASED)} or {_GAIN} only, got {text!r}")
    name = f"{mode}{f':{base}' if base else ''}{f'*{gain}' if gain else ''}"
    try:
        one = Variant(name, mode, int(base or 2), None if gain is None else float(gain))
        one.scaling(1, 1)  # refuses the base
    except ValueError as error:
        raise CommandError(f"--modes: {text!r}: {error}") from error
    return one


def _trained(text: str, context: int | None) -> str:
    if context is None:
        raise CommandError(
            f"--modes: expected a base in {text!r}, as the model's configuration has no max_position_embeddings: "
            f"{text.split(':')[0].split('*')[0]}:BASE"
        )
    return str(context)
