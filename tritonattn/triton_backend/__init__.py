"""The "triton" backend: calls as kernel launches, on a GPU, in the interpreter, or wherever launch.run sends them."""

from .attention import backward, forward, problem_of
from .decode import decode
from .key_statistics import key_statistics, key_statistics_backward

__all__ = ["backward", "decode", "forward", "key_statistics", "key_statistics_backward", "problem_of"]
