"""Diagnosis of attention: its softmax and gradients, in one call or during training, and remedies."""

from .advise import Advice, Finding, advise
from .alarms import Alarm, Thresholds
from .diagnosis import Diagnosis, diagnose
from .monitor import Monitor
from .positions import loss_by_position, plot_loss_by_position
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
    "loss_by_position",
    "plot_loss_by_position",
    "qk_clip",
]


def __dir__() -> list[str]:
    return sorted(__all__)
