"""Ways to compute attention, behind one protocol: kernels, installed libraries, PyTorch, and the eager reference."""

from .by_kernels import kernels, kernels_take
from .choice import BACKENDS, choose

__all__ = ["BACKENDS", "choose", "kernels", "kernels_take"]
