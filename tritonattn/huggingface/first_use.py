"""Extensions of methods of transformers, which an import leaves alone: they wait for the first use in this process.

The first use is the first model of transformers that is built after the import, or the first layer that gets a scaling.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel

_waiting: list[Callable[[], None]] = []
_lock = threading.Lock()


def at_first_use(*calls: Callable[[], None]) -> None:
    """Call these at the first use, in this order."""
    if not _waiting:
        register_module_module_registration_hook(_note_model)
    _waiting.extend(calls)


def is_waiting() -> bool:
    """Whether no model was built since the import: one from before it takes tritonattn's masks unchecked."""
    return bool(_waiting)


def note_use() -> None:
    """Make the calls that wait; they are made once."""
    if _waiting:
        with _lock:
            for call in _waiting:
                call()
            _waiting.clear()


def _note_model(parent: nn.Module, name: str, child: Any) -> None:
    """A hook of torch, called with each module that gets a child: a model does so before its `post_init`."""
    if _waiting and isinstance(parent, PreTrainedModel):
        note_use()
