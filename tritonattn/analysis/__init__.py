"""What the softmax of an attention looks like, how much of a gradient passes it, and what to do about it."""

from .alarms import Alarm, Thresholds
from .diagnosis import Diagnosis, diagnose
from .monitor import Monitor
from .qk_clip import QKClip, qk_clip

__all__ = ["Alarm", "Diagnosis", "Monitor", "QKClip", "Thresholds", "diagnose", "qk_clip"]
