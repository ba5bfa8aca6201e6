"""What the softmax of an attention looks like, how much of a gradient passes it, and what to do about it."""

from .advise import Advice, Finding, advise
from .alarms import Alarm, Thresholds
from .diagnosis import Diagnosis, diagnose
from .monitor import Monitor
from .qk_clip import QKClip, qk_clip
from .rules import RULES, Reading, Rule

__all__ = [
    "RULES",
    "Advice",
    "Alarm",
    "Diagnosis",
    "Finding",
    "Monitor",
    "QKClip",
    "Reading",
    "Rule",
    "Thresholds",
    "advise",
    "diagnose",
    "qk_clip",
]
