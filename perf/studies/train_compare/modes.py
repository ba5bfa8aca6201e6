"""The modes of a study, and two of them, as "sqrt_dim:log_key_count"."""

from __future__ import annotations

SWAP = ":"
MODES = (
    "sqrt_dim",
    "key_norm_mean",
    "key_norm_sum+gain",
    "key_count",
    "key_count+gain",
    "log_key_count",
    "ssmax",
    "learned_cosine",
    "power_law",
)


def trained_and_tested(mode: str) -> tuple[str, str]:
    """Split "sqrt_dim:log_key_count", trained with the first and tested with the second; one name is both."""
    trained, _, tested = mode.partition(SWAP)
    return trained, tested or trained
