"""What the softmax of an attention looks like, and how much of a gradient passes it."""

from .diagnosis import Diagnosis, diagnose

__all__ = ["Diagnosis", "diagnose"]
