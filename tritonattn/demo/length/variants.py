"""The scalings of a length study."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...command import CommandError
from ...scaling import SCALINGS, LogKeyCount, QwenLogn, Scaling

_WRITTEN = re.compile(r"(?P<mode>\w+)(:(?P<base>\w+))?(\*(?P<gain>[\d.]+))?")
_BASED: dict[str, type[LogKeyCount | QwenLogn]] = {"log_key_count": LogKeyCount, "qwen_logn": QwenLogn}
BASELINE = "sqrt_dim"
VARIANTS = (
    BASELINE, "sqrt_dim*1.08", "qwen_logn:CONTEXT", "qwen_logn:2048", "log_key_count:CONTEXT", "llama4",
    "key_norm_mean",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A scaling with a constant gain, and its name."""

    name: str
    scaling: str | Scaling
    gain: float | None = None


def variant(text: str, context: int) -> Variant:
    """NAME[:BASE][*GAIN]; a BASE of CONTEXT is the model's trained length.

    Raises CommandError for what is none.
    """
    parts = _WRITTEN.fullmatch(text)
    mode, base, gain = parts.group("mode", "base", "gain") if parts else ("", None, None)
    if mode not in SCALINGS:
        raise CommandError(f"--modes: wanted NAME[:BASE][*GAIN] with a name out of {', '.join(SCALINGS)}; got {text!r}")
    if base is not None and mode not in _BASED:
        raise CommandError(f"--modes: wanted a base after {' or '.join(_BASED)} only, got {text!r}")
    try:
        scaling = mode if base is None else _BASED[mode](context if base == "CONTEXT" else float(base))
        return Variant(text.replace("CONTEXT", str(context)), scaling, None if gain is None else float(gain))
    except ValueError as error:
        raise CommandError(f"--modes: {text!r}: {error}") from error
