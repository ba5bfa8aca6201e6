"""Replay the loops of kernels by their control codes: the share of the tensor rate, and what warps wait for."""

from .command import add_arguments, run
from .kernel import Replay, replay

__all__ = ["Replay", "add_arguments", "replay", "run"]
