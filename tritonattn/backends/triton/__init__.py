"""The "triton" backend: calls as kernel launches, on a GPU, in the interpreter, or wherever launch.run sends them."""

from .attention import are_few_rows, problem_of
from .backward import backward
from .decode import decode
from .forward import forward
from .key_norms import key_norms, key_norms_backward, prefix_sums
from .key_records import append_keys, append_to_pages
from .launch import KERNELS, VARIANTS, Variant
from .ranges import argmax_over_ranges, seen_keys
from .second import second
from .tangent import tangent


def _hopper_forward() -> Variant:
    from .hopper_forward import VARIANT

    return VARIANT


VARIANTS["forward", "gluon"] = _hopper_forward

__all__ = [
    "KERNELS",
    "append_keys",
    "append_to_pages",
    "are_few_rows",
    "argmax_over_ranges",
    "backward",
    "decode",
    "forward",
    "key_norms",
    "key_norms_backward",
    "prefix_sums",
    "problem_of",
    "second",
    "seen_keys",
    "tangent",
]
