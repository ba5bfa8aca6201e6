"""Small tasks on which scalings can be compared."""

from .base import IGNORED, Batch, Task, loss_of
from .digits import Digits
from .recall import Recall
from .spell import Spell
from .text import Text

TASKS: dict[str, Task] = {task.name: task for task in (Text(), Digits(), Spell(), Recall())}

__all__ = ["IGNORED", "TASKS", "Batch", "Task", "loss_of"]
