"""What attention does, and what to do about it."""

from .alarms import Alarm, Thresholds
from .monitor import Monitor

__all__ = [
    "Alarm",
    "Monitor",
    "Thresholds",
]
