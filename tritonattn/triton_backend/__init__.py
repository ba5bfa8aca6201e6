"""The "triton" backend: calls as kernel launches, on a GPU, in the interpreter, or wherever launch.run sends them."""

from .attention import backward, forward, problem_of
from .key_statistics import key_statistics, key_statistics_backward

__all__ = ["backward", "forward", "key_statistics", "key_statistics_backward", "problem_of"]
