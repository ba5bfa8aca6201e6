"""The scalings of a command's --modes: NAME[:BASE][*GAIN]."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ...core.errors import CommandError
from ...scaling import SCALINGS, LogKeyCount, QwenLogn, Scaling

_WRITTEN = re.compile(r"(?P<mode>\w+)(:(?P<base>\w+)|\((?P<advised>\w+)\))?(\*(?P<gain>[\d.]+))?")
_BASED: dict[str, type[LogKeyCount | QwenLogn]] = {"log_key_count": LogKeyCount, "qwen_logn": QwenLogn}
BASELINE = "sqrt_dim"


@dataclass(frozen=True)
class Variant:
    """A scaling with a constant gain, and its name."""

    name: str
    scaling: str | Scaling
    gain: float | None = None


def variants(texts: Iterable[str], context: int | None) -> list[Variant]:
    """Parse modes: the baseline first, then each once, though a BASE of CONTEXT may be the number of another."""
    found = (variant(text, context) for text in (BASELINE, *texts))
    return list({one.name: one for one in found}.values())


def check_written(texts: Iterable[str]) -> None:
    """Raise CommandError for a mode that no model has, before one is loaded."""
    for text in texts:
        variant(text, 2048)  # of any context length


def variant(text: str, context: int | None) -> Variant:
    """Parse NAME[:BASE][*GAIN], or NAME(BASE) as in `Advice.mode`; a BASE of CONTEXT is the model's trained length.

    Raises CommandError for another text.
    """
    parts = _WRITTEN.fullmatch(text)
    mode, base, advised, gain = parts.group("mode", "base", "advised", "gain") if parts else ("", None, None, None)
    base = base or advised
    if mode not in SCALINGS:
        raise CommandError(
            f"--modes: expected NAME[:BASE][*GAIN] with a name out of {', '.join(SCALINGS)}, got {text!r}"
        )
    if base is not None and mode not in _BASED:
        raise CommandError(f"--modes: expected a base after {' or '.join(_BASED)} only, got {text!r}")
    if base == "CONTEXT":
        if context is None:
            raise CommandError(
                f"--modes: expected a model whose configuration has max_position_embeddings for {text!r}, got none"
            )
        text, base = text.replace("CONTEXT", str(context)), str(context)
    try:
        scaling = mode if base is None else _BASED[mode](float(base))
        return Variant(text, scaling, None if gain is None else float(gain))
    except ValueError as error:
        raise CommandError(f"--modes: {text!r}: {error}") from error
